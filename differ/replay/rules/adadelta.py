"""Adadelta: the step has the size of the steps before.

    v    rho v' + (1 - rho) g^2                    square_avg
    d    sqrt(u' + eps) / sqrt(v + eps) g          the step, times lr
    u    rho u' + (1 - rho) d^2                    acc_delta

Sources: torch.optim.Adadelta, mlx.optimizers.AdaDelta; Zeiler 2012, arXiv:1212.5701.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.base import ADDED, Choices, Family, Hyper, Replayed, rules

SQUARE: Final = "square_avg"
STEPS: Final = "acc_delta"


class AdaDelta(Family):
    """See the module."""

    name = "adadelta"
    updates = rules("adadelta", decay=("none", "coupled", "decoupled"))
    moments: ClassVar = dict.fromkeys((SQUARE, STEPS), rules("adadelta", decay=ADDED))
    words: ClassVar = {("optimizer", "adadelta"): "Adadelta"}

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """Mean squares of gradients and of steps."""
        del hyper
        return kinds == {SQUARE, STEPS}

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """lr d."""
        del w
        return inputs.hyper.lr * self._step(inputs, choices, start)

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """Either mean square."""
        rho, before = inputs.hyper.get("rho"), inputs.before.block(start, start + BLOCK)
        taken = inputs.g(start, choices) if inputs.kind == SQUARE else self._step(inputs, choices, start)
        return rho * before, (1.0 - rho) * np.square(taken)

    def _step(self, inputs: Replayed, choices: Choices, start: int) -> Float64:
        eps, before = inputs.hyper.eps, inputs.earlier(STEPS, start)
        step: Float64 = np.sqrt(before + eps) / np.sqrt(inputs.state(SQUARE, start) + eps) * inputs.g(start, choices)
        return step
