"""Adam, AdamW, AMSGrad and their variants.

g clipped gradient, w parameter before, m = exp_avg and v = exp_avg_sq after this update, t its number:

    moments      m = b1 m' + (1 - b1) g          v = b2 v' + (1 - b2) g^2       coupled decay: g + wd w instead of g
    correction   yes: m / (1 - b1^t), v / (1 - b2^t)        no: m, v as they are
    update       lr m^ / (sqrt(v^) + eps)                    eps outside (torch, MLX)
                 lr m^ / sqrt(v^ + eps)                      inside
                 lr m^ sqrt(c2) / (sqrt(v) + eps)            before the correction of v, c2 = 1 - b2^t
    decay        decoupled: w (1 - lr wd) - update           none: w - update
    AMSGrad      max_exp_avg_sq = max(max_exp_avg_sq', v) takes the place of v in the update

Sources: torch.optim.Adam/AdamW, mlx.optimizers.Adam/AdamW.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.base import Choices, Family, Hyper, Replayed, Rule, rule, rules

FIRST_MOMENT: Final = "exp_avg"
SECOND_MOMENT: Final = "exp_avg_sq"
LARGEST: Final = "max_exp_avg_sq"

RULES: Final[tuple[Rule, ...]] = rules(
    "adam", eps=("outside", "inside", "before"), correction=("yes", "no"), decay=("decoupled", "none")
)
# Shared by all that keep these moments in this way, so they name no optimizer.
MOMENT_RULES: Final[tuple[Rule, ...]] = (rule(decay="none"), rule(decay="coupled"))


def running_mean(inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
    """Blocks of `exp_avg` or `exp_avg_sq`: what is kept, what is taken in."""
    hyper, g = inputs.hyper, inputs.g(start, choices)
    before = inputs.before.block(start, start + BLOCK)
    if inputs.kind == FIRST_MOMENT:
        return hyper.beta1 * before, (1.0 - hyper.beta1) * g
    return hyper.beta2 * before, (1.0 - hyper.beta2) * np.square(g)


class Adam(Family):
    """See the module."""

    name = "adam"
    updates = RULES
    moments: ClassVar = {FIRST_MOMENT: MOMENT_RULES, SECOND_MOMENT: MOMENT_RULES, LARGEST: MOMENT_RULES[:1]}
    words: ClassVar = {
        ("optimizer", "adam"): "Adam",
        ("correction", "yes"): "bias correction",
        ("correction", "no"): "no bias correction",
        ("decay", "decoupled"): "decoupled weight decay",
        ("decay", "coupled"): "weight decay added to the gradient",
        ("decay", "none"): "no weight decay",
        ("eps", "outside"): "eps added to the corrected root",
        ("eps", "inside"): "eps inside the root",
        ("eps", "before"): "eps added before the correction",
    }

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """Both moments."""
        del hyper
        return kinds - {LARGEST} == {FIRST_MOMENT, SECOND_MOMENT}

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """lr m^ / (sqrt(v^) + eps)."""
        del w
        hyper = inputs.hyper
        m = inputs.state(FIRST_MOMENT, start)
        v = inputs.state(LARGEST if LARGEST in inputs.held.kinds else SECOND_MOMENT, start)
        corrected = choices["correction"] == "yes"
        c1 = 1.0 - hyper.beta1**hyper.step if corrected else 1.0
        c2 = 1.0 - hyper.beta2**hyper.step if corrected else 1.0
        if choices["eps"] == "inside":
            denominator = np.sqrt(v / c2 + hyper.eps)
        elif choices["eps"] == "before":
            denominator = (np.sqrt(v) + hyper.eps) / math.sqrt(c2)
        else:
            denominator = np.sqrt(v) / math.sqrt(c2) + hyper.eps
        # 0 / 0 is what an optimizer without eps leaves behind as nan, and the recorded parameter then says so.
        update: Float64 = hyper.lr * (m / c1) / denominator
        return update

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """Running means of g and g^2, and the largest of the latter."""
        if inputs.kind == LARGEST:
            before = inputs.before.block(start, start + BLOCK)
            return before, np.maximum(inputs.state(SECOND_MOMENT, start) - before, 0.0)
        return running_mean(inputs, choices, start)
