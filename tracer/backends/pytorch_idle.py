"""Updates of a PyTorch run that had no gradient to work with, and what is said of a run that made no others.

Invariant: only counts and words are kept, no optimizer and no tensor.
"""

from __future__ import annotations

from typing import Any

from tracer.backends.pytorch_model import trainable
from tracer.backends.pytorch_registry import Registry


def overflowed(optimizer: Any) -> bool:
    """Whether a fused optimizer will leave all as it is for an inf or nan in a scaled gradient."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0.0


class Idle:
    """The updates without a gradient so far."""

    def __init__(self) -> None:
        self.backward_seen = False
        self._seen = 0
        self._skipped = 0
        self._why, self._hint = "", ""

    def update(self, registry: Registry, optimizer: Any) -> None:
        """An optimizer is about to update nothing."""
        self._seen += 1
        if overflowed(optimizer):
            self._skipped += 1
            return
        tracked = {id(p) for _, p in registry.tracked()}
        held = sum(id(p) in tracked for p in trainable(optimizer))
        if not tracked:
            count = sum(len(group["params"]) for group in optimizer.param_groups)
            self._why = f"all {count} tensors of the optimizer are frozen"
            self._hint = "set requires_grad of what is to be trained"
        elif not self.backward_seen and held:
            self._why = "no backward was seen"
            self._hint = "the loss has to be differentiated, by its backward(), before the optimizer's step"
        else:
            self._why = f"the optimizer holds {held} of {len(tracked)} trainable tensors"
            self._hint = "make the optimizer once the model is complete, of the parameters that are to be trained"

    def skipped(self) -> None:
        """A GradScaler did not call the optimizer, for an inf or nan in a scaled gradient."""
        self._seen += 1
        self._skipped += 1

    def explanation(self) -> tuple[str, str] | None:
        """What was seen, and a hint; None if there was no such update."""
        if not self._seen:
            return None
        seen = "1 optimizer step was seen" if self._seen == 1 else f"{self._seen} optimizer steps were seen"
        if self._skipped == self._seen:
            return f"{seen}, skipped for an inf or nan in the scaled gradients", "lower the GradScaler's init_scale"
        return f"{seen}, none with a gradient; {self._why}", self._hint
