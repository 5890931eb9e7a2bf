"""The dtype that the program's own `torch.autocast` computes in, or none.

Autocast may begin around the model's call, or inside it (a decorated `forward`, which is accelerate's way), so it is
looked at where the first module with parameters of its own is called.  Invariants: the hook that looks is taken off by the
first such call, returns nothing and changes nothing, and is never there in a compiled model, which would be compiled with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tracer.backends.pytorch_model import is_compiled

if TYPE_CHECKING:
    from tracer.recorder import Recorder

NONE: Final = "none"


class Autocast:
    """What the latest forward computed in: a dtype, `none`, or None where it cannot be seen."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self.dtype: str | None = None
        self._handle: Any = None

    def begin(self, root: Any) -> None:
        """A root module is about to run."""
        self.end()
        import torch

        self.dtype = _dtype_at(root)
        if is_compiled(root):
            inner = root._modules.get("_orig_mod", root)
            if self.dtype == NONE and "forward" in vars(inner):
                # Somebody has wrapped what is compiled, and what happens in there is not seen.
                self.dtype = None
            return
        self._handle = torch.nn.modules.module.register_module_forward_pre_hook(self._called)

    def observe(self) -> None:
        """Note what the latest forward computed in: its loss is differentiated."""
        if self.dtype is not None:
            self._recorder.observe("autocast", self.dtype)

    def end(self) -> None:
        """Take the hook off, if it is there still."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.remove()

    def _called(self, module: Any, _args: Any) -> None:
        """Some module is called; changes nothing of it."""
        import torch

        # First, so that a compiler that traces us sees an empty function.
        if torch.compiler.is_compiling() or self._handle is None or not module._parameters:
            return
        with self._recorder.guard():
            self.end()
            self.dtype = _dtype_at(module)


def _dtype_at(module: Any) -> str:
    import torch

    device = next((p.device.type for p in module.parameters()), "cpu")
    if not torch.is_autocast_enabled(device):
        return NONE
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
