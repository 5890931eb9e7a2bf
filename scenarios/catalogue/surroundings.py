"""What a training run can leave behind in its process: random states, framework-wide flags, hooks, replaced functions.

Arms that share a process must not notice each other.  What can be put back (random states, environment, warning filters) is put
back before each arm, to what it was when the process started; anything else that an arm has changed is named, and the process
that holds it is given up.  Frameworks are looked at where they are imported, never imported from here.
"""

from __future__ import annotations

import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, Final

# Modules whose classes and functions a program may have replaced.
LIBRARIES: Final = (
    "torch.nn.", "torch.optim", "torch.utils.checkpoint", "torch.autograd", "transformers.trainer", "transformers.modeling_utils",
    "transformers.loss", "transformers.models.", "peft.tuners.lora", "peft.peft_model", "accelerate.accelerator", "mlx.nn",
    "mlx.optimizers", "mlx_lm.models.", "mlx_lm.tuner", "mlx_lm.utils",
)  # fmt: skip
# A function that comes from one of these and is found in a library is a program's doing.
_OURS: Final = ("scenarios.", "tests.", "__main__")
# Libraries that replace methods of another's classes when they train, by functions that they make then.
_TRAINERS: Final = ("mlx_lm.tuner", "unsloth_zoo", "trl.")
Holder = tuple[str, str]


class Surroundings:
    """The state of this process that training runs share, as it was when this was made."""

    def __init__(self) -> None:
        self._environment = dict(os.environ)
        self._filters = list(warnings.filters)
        self._states = dict(_random_states())
        self._flags = dict(_flags())
        self._functions = dict(_functions())

    def restore(self) -> None:
        """Put back random states, environment and warning filters."""
        os.environ.clear()
        os.environ.update(self._environment)
        if list(warnings.filters) != self._filters:
            warnings.filters[:] = self._filters  # type: ignore[index]  # a list, whatever its stub says
            warnings._filters_mutated()  # type: ignore[attr-defined]  # what `warnings` itself calls to drop its cache
        for name, put in _STATES.items():
            if name in self._states:
                put(self._states[name])

    def left(self) -> tuple[str, ...]:
        """What is otherwise than it was and cannot be put back, named.  In what is new, a program's functions count."""
        flags = dict(_flags())
        found = [name for name, value in self._flags.items() if flags.get(name) != value]
        for where, functions in _functions():
            before = self._functions.get(where)
            for name, function in functions.items():
                was = None if before is None else before.get(name)
                if (was is not None and was is not function) or (was is None and _foreign(where[0], function)):
                    found.append(".".join(filter(None, (*where, name))))
        return tuple(sorted(found))


def _foreign(module: str, function: Any) -> bool:
    """Whether a function in a library's module comes from a program, or from inside a function of the library's trainer."""
    origin = getattr(function, "__module__", None) or ""
    made_inside = "<locals>" in getattr(function, "__qualname__", "")
    return origin.startswith(_OURS) or (made_inside and origin != module and origin.startswith(_TRAINERS))


def _functions() -> Iterator[tuple[Holder, dict[str, Any]]]:
    """Module and class (empty: the module itself) -> the functions in it."""
    for name, module in list(sys.modules.items()):
        # Real modules only: a lazy one answers by importing.
        if not name.startswith(LIBRARIES) or not issubclass(type(module), ModuleType):
            continue
        contents = dict(vars(module))
        yield (name, ""), {key: value for key, value in contents.items() if type(value) is FunctionType}
        for kind in contents.values():
            if isinstance(kind, type) and kind.__module__ == name:
                yield (name, kind.__qualname__), {k: v for k, v in vars(kind).items() if type(v) is FunctionType}


def _flags() -> Iterator[tuple[str, Any]]:
    """Settings of the frameworks that hold for the whole process, and how many hooks there are."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        yield "torch.default_dtype", str(torch.get_default_dtype())
        yield "torch.default_device", str(torch.get_default_device())
        yield "torch.num_threads", torch.get_num_threads()
        yield "torch.grad_enabled", torch.is_grad_enabled()
        yield "torch.anomaly_enabled", torch.is_anomaly_enabled()
        yield "torch.deterministic", torch.are_deterministic_algorithms_enabled()
        yield "torch.float32_matmul_precision", torch.get_float32_matmul_precision()
        yield "torch.autocast", torch.is_autocast_enabled("cpu")
        for holder in ("torch.nn.modules.module", "torch.optim.optimizer"):
            held = vars(sys.modules[holder]).items() if holder in sys.modules else ()
            hooks = {key: value for key, value in held if key.startswith("_global") and "hook" in key}
            yield from ((f"{holder}.{k}", len(v)) for k, v in hooks.items() if isinstance(v, Mapping))
    if "mlx.core" in sys.modules:
        yield "mlx.default_device", str(sys.modules["mlx.core"].default_device())
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        yield "numpy.errstate", tuple(sorted(numpy.geterr().items()))
    yield "working directory", os.getcwd()


def _random_states() -> Iterator[tuple[str, Any]]:
    yield "random", random.getstate()
    if "numpy" in sys.modules:
        yield "numpy", sys.modules["numpy"].random.get_state()
    if "torch" in sys.modules:
        yield "torch", sys.modules["torch"].get_rng_state()
    if "mlx.core" in sys.modules:
        yield "mlx.core", None


_STATES: Final[Mapping[str, Callable[[Any], Any]]] = {
    "random": random.setstate,
    "numpy": lambda state: sys.modules["numpy"].random.set_state(state),
    "torch": lambda state: sys.modules["torch"].set_rng_state(state),
    # Its state cannot be set; a process that has just started has one from the clock.
    "mlx.core": lambda _: sys.modules["mlx.core"].random.seed(time.time_ns() % 2**32),
}
