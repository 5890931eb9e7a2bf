"""RMSprop, centered or not, with and without momentum.

    moments   v = a v' + (1 - a) g^2      centered: c = a c' + (1 - a) g
    size      sqrt(v) + eps, sqrt(v - c^2) + eps centered; sqrt(v + eps) with eps inside
    step      lr g / size, or with momentum lr buffer, buffer = mu buffer' + g / size

Sources: torch.optim.RMSprop, mlx.optimizers.RMSprop.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.base import ADDED, Choices, Family, Hyper, Replayed, rules

SQUARE: Final = "square_avg"
MEAN: Final = "grad_avg"
BUFFER: Final = "momentum_buffer"
# Units in the last place of a float32 that the difference under the centered root may be off by.
_CANCELLED: Final = 8 * 1.2e-7


class RmsProp(Family):
    """See the module."""

    name = "rmsprop"
    updates = rules("rmsprop", eps=("outside", "inside"), decay=("none", "coupled", "decoupled"))
    moments: ClassVar = {
        SQUARE: rules("rmsprop", decay=ADDED),
        MEAN: rules("rmsprop", decay=ADDED),
        BUFFER: rules("rmsprop", eps=("outside", "inside"), decay=ADDED),
    }
    words: ClassVar = {("optimizer", "rmsprop"): "RMSprop"}

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """The mean square, and what its variants add."""
        return SQUARE in kinds and kinds <= {SQUARE, MEAN, BUFFER} and "alpha" in hyper.more

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """lr g / size, or lr times the buffer."""
        del w
        if BUFFER in inputs.held.kinds and inputs.hyper.momentum:
            return inputs.hyper.lr * inputs.state(BUFFER, start)
        update: Float64 = inputs.hyper.lr * inputs.g(start, choices) / self._size(inputs, choices, start)
        return update

    def slack(self, inputs: Replayed, choices: Choices, start: int, update: Float64) -> Float64 | float:
        """The centered root loses digits where v and c^2 are close."""
        del choices
        if MEAN not in inputs.held.kinds:
            return 0.0
        v = inputs.state(SQUARE, start)
        left = np.maximum(v - np.square(inputs.state(MEAN, start)), _CANCELLED * v + 1e-300)
        loss: Float64 = _CANCELLED * np.abs(update) * v / left
        return loss

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """The mean square, the mean, or the buffer."""
        keep = inputs.hyper.get("alpha")
        before, g = inputs.before.block(start, start + BLOCK), inputs.g(start, choices)
        if inputs.kind == SQUARE:
            return keep * before, (1.0 - keep) * np.square(g)
        if inputs.kind == MEAN:
            return keep * before, (1.0 - keep) * g
        return inputs.hyper.momentum * before, g / self._size(inputs, choices, start)

    def _size(self, inputs: Replayed, choices: Choices, start: int) -> Float64:
        v, eps = inputs.state(SQUARE, start), inputs.hyper.eps
        if MEAN in inputs.held.kinds:
            v = v - np.square(inputs.state(MEAN, start))
        size: Float64 = np.sqrt(v + eps) if choices["eps"] == "inside" else np.sqrt(v) + eps
        return size
