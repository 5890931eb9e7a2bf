"""Adagrad: steps get shorter by all the gradients so far.

    sum     sum' + g^2, from initial_accumulator_value on
    step    lr / (1 + (t - 1) lr_decay) g / (sqrt(sum) + eps);      eps inside: g / sqrt(sum + eps)

Sources: torch.optim.Adagrad, mlx.optimizers.Adagrad; Duchi et al. 2011.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.base import ADDED, Choices, Family, Hyper, Replayed, rules

SUM: Final = "sum"


class Adagrad(Family):
    """See the module."""

    name = "adagrad"
    updates = rules("adagrad", eps=("outside", "inside"), decay=("none", "coupled", "decoupled"))
    moments: ClassVar = {SUM: rules("adagrad", decay=ADDED)}
    words: ClassVar = {("optimizer", "adagrad"): "Adagrad"}

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """The sum of squares."""
        del hyper
        return kinds == {SUM}

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """lr g / size."""
        del w
        hyper, total = inputs.hyper, inputs.state(SUM, start)
        size = np.sqrt(total + hyper.eps) if choices["eps"] == "inside" else np.sqrt(total) + hyper.eps
        lr = hyper.lr / (1.0 + (hyper.step - 1) * hyper.get("lr_decay"))
        update: Float64 = lr * inputs.g(start, choices) / size
        return update

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """The sum."""
        return inputs.before.block(start, start + BLOCK), np.square(inputs.g(start, choices))
