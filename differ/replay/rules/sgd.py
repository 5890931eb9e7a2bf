"""SGD with and without momentum, plain or Nesterov.

    buffer    mu buffer' + (1 - d) g      torch's first buffer is g itself (whole), MLX's (1 - d) g
    step      lr buffer, or lr (g + mu buffer) with Nesterov; lr g without momentum
    decay     coupled: g + wd w instead of g; decoupled: w (1 - lr wd); none

Without momentum MLX keeps a buffer that stays as it is.  Sources: torch.optim.SGD, mlx.optimizers.SGD.
"""

from __future__ import annotations

from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.base import Choices, Family, Hyper, Replayed, Rule, rules

# torch's name and MLX's.
MOMENTUM: Final = ("momentum_buffer", "v")
MOMENTUM_RULES: Final[tuple[Rule, ...]] = rules("sgd", decay=("none", "coupled"), first=("whole", "dampened"))


class Sgd(Family):
    """See the module."""

    name = "sgd"
    updates = rules("sgd", nesterov=("no", "yes"), decay=("coupled", "decoupled", "none"))
    moments: ClassVar = dict.fromkeys(MOMENTUM, MOMENTUM_RULES)
    words: ClassVar = {
        ("optimizer", "sgd"): "SGD",
        ("nesterov", "yes"): "Nesterov momentum",
        ("nesterov", "no"): "plain momentum",
        ("first", "whole"): "first buffer undampened",
        ("first", "dampened"): "first buffer dampened",
    }

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """A buffer, or nothing at all; with betas or an eps it is something else."""
        if hyper.beta1 or hyper.beta2 or hyper.eps or not kinds <= set(MOMENTUM) or len(kinds) > 1:
            return False
        return bool(kinds) or not hyper.momentum

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """lr times the buffer, the gradient, or both."""
        del w
        hyper = inputs.hyper
        if not hyper.momentum or not inputs.held.kinds:
            return hyper.lr * inputs.g(start, choices)
        buffer = inputs.state(next(iter(inputs.held.kinds)), start)
        if choices["nesterov"] == "no":
            return hyper.lr * buffer
        return hyper.lr * (inputs.g(start, choices) + hyper.momentum * buffer)

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """The buffer."""
        hyper = inputs.hyper
        before = inputs.before.block(start, start + BLOCK)
        if not hyper.momentum:
            return before, np.zeros_like(before)
        g = inputs.g(start, choices)
        if choices["first"] == "whole" and hyper.step <= 1:
            return np.zeros_like(g), g
        return hyper.momentum * before, (1.0 - hyper.dampening) * g
