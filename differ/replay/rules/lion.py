"""Lion: the sign of a mean of the gradient and the momentum.

    update     lr sign(b1 m' + (1 - b1) g)           m' before this update
    momentum   m = b2 m' + (1 - b2) g

The sign of a sum that is within rounding of zero may be either.  Sources: mlx.optimizers.Lion; Chen et al. 2023,
arXiv:2302.06675.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.base import ADDED, Choices, Family, Hyper, Replayed, rules
from tracer.dtypes import EPSILON

MOMENTUM: Final = "exp_avg"
# Units in the last place of its terms that the sum may be off by.
_UNITS: Final = 4


class Lion(Family):
    """See the module."""

    name = "lion"
    updates = rules("lion", decay=("decoupled", "coupled", "none"))
    moments: ClassVar = {MOMENTUM: rules("lion", decay=ADDED)}
    words: ClassVar = {("optimizer", "lion"): "Lion"}

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """One momentum, and two betas."""
        return kinds == {MOMENTUM} and hyper.beta2 > 0.0

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """lr sign(c)."""
        del w
        kept, taken = self._terms(inputs, choices, start)
        return inputs.hyper.lr * np.sign(kept + taken)

    def slack(self, inputs: Replayed, choices: Choices, start: int, update: Float64) -> Float64 | float:
        """Two steps where the sign is rounding."""
        del update
        kept, taken = self._terms(inputs, choices, start)
        eps = EPSILON.get(inputs.after.dtype, 0.0)
        unclear = np.abs(kept + taken) <= _UNITS * eps * (np.abs(kept) + np.abs(taken))
        slack: Float64 = np.where(unclear, 2.0 * inputs.hyper.lr, 0.0)
        return slack

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """The momentum."""
        beta = inputs.hyper.beta2
        return beta * inputs.before.block(start, start + BLOCK), (1.0 - beta) * inputs.g(start, choices)

    def _terms(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        beta = inputs.hyper.beta1
        return beta * inputs.earlier(MOMENTUM, start), (1.0 - beta) * inputs.g(start, choices)
