"""Adamax: Adam with the largest gradient in place of the root of the mean square.

    moments   m = b1 m' + (1 - b1) g        u = max(b2 u', |g| + eps)   (torch)     u = max(b2 u', |g|)   (MLX)
    update    lr m / (1 - b1^t) / u         corrected, eps in the norm (torch)
              lr m / (u + eps)              not corrected, eps outside (MLX)

Sources: torch.optim.Adamax, mlx.optimizers.Adamax; Kingma & Ba 2015, arXiv:1412.6980, algorithm 2.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.adam import FIRST_MOMENT, MOMENT_RULES, running_mean
from differ.replay.rules.base import ADDED, Choices, Family, Hyper, Replayed, rules

NORM: Final = "exp_inf"


class Adamax(Family):
    """See the module."""

    name = "adamax"
    # Coupled decay is in the moments already: for the update it is no decay.
    updates = rules("adamax", eps=("norm", "outside"), correction=("yes", "no"), decay=("none", "decoupled"))
    moments: ClassVar = {
        FIRST_MOMENT: MOMENT_RULES,
        NORM: rules("adamax", eps=("norm", "outside"), decay=ADDED),
    }
    words: ClassVar = {("optimizer", "adamax"): "Adamax", ("eps", "norm"): "eps added to the gradient's size"}

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """A mean and a norm."""
        del hyper
        return kinds == {FIRST_MOMENT, NORM}

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """lr m^ / u."""
        del w
        hyper = inputs.hyper
        c1 = 1.0 - hyper.beta1**hyper.step if choices["correction"] == "yes" else 1.0
        size = inputs.state(NORM, start) + (hyper.eps if choices["eps"] == "outside" else 0.0)
        update: Float64 = hyper.lr / c1 * inputs.state(FIRST_MOMENT, start) / size
        return update

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """The mean, or the larger of the norm and the gradient."""
        if inputs.kind == FIRST_MOMENT:
            return running_mean(inputs, choices, start)
        hyper = inputs.hyper
        kept = hyper.beta2 * inputs.before.block(start, start + BLOCK)
        taken = np.abs(inputs.g(start, choices)) + (hyper.eps if choices["eps"] == "norm" else 0.0)
        larger = taken > kept
        return np.where(larger, 0.0, kept), np.where(larger, taken, 0.0)
