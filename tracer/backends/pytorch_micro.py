"""The gradient of each micro-batch, as it arrives at the parameters and before it is added to what they hold.

A hook on a leaf tensor is called with exactly what its gradient is about to grow by.  Hooks live from the beginning of a
backward to its end.  Invariants: a hook returns nothing, so that the gradient goes on unchanged, and keeps only a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tracer.backends.pytorch_copies import take_all
from tracer.backends.pytorch_registry import Named
from tracer.backends.pytorch_tensors import Taken, is_distributed, no_gradient, unrecorded_like, unscaled

if TYPE_CHECKING:
    from tracer.recorder import Recorder


class MicroGradients:
    """Hooks of one backward at a time."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._handles: list[Any] = []
        # A gradient that arrives in parts (a checkpointed segment runs a backward of its own) is their sum.
        self._arrived: dict[int, Any] = {}

    def begin(self, parameters: Sequence[Named]) -> None:
        """A backward begins."""
        self.discard()
        for _, parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf:
                self._handles.append(parameter.register_hook(self._hook(id(parameter))))

    def end(self, parameters: Sequence[Named], scale: float) -> dict[int, Taken]:
        """The backward has ended: gradient of each parameter by id, unscaled."""
        arrived = self._arrived
        self.discard()
        taken = dict(zip(arrived, take_all(list(arrived.values())), strict=True))
        return {id(p): unscaled(taken[id(p)], scale) if id(p) in taken else _not_arrived(p) for _, p in parameters}

    def discard(self) -> None:
        """Take the hooks off and forget what they saw."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._arrived = [], {}

    def _hook(self, key: int) -> Any:
        def arrive(gradient: Any) -> None:
            import torch

            with self._recorder.guard(), torch.no_grad():
                plain = gradient.detach()
                before = self._arrived.get(key)
                self._arrived[key] = plain.clone() if before is None else before + plain

        return arrive


def _not_arrived(parameter: Any) -> Taken:
    """What stands for a gradient that no hook saw: `fully_shard` gives its parameters theirs without autograd."""
    return unrecorded_like(parameter) if is_distributed(parameter) else no_gradient(parameter)
