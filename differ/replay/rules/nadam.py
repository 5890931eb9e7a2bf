"""NAdam: Adam with Nesterov's look ahead, whose momentum grows with the step.

    mu_t         b1 (1 - 0.96^(t d) / 2)             d momentum_decay; mu_product = mu_1 ... mu_t
    update       lr ((1 - mu_t) g / (1 - mu_product) + mu_(t+1) m / (1 - mu_product mu_(t+1))) / (sqrt(v / (1 - b2^t)) + eps)
    moments      those of Adam

Source: torch.optim.NAdam; Dozat 2016, "Incorporating Nesterov momentum into Adam".
"""

from __future__ import annotations

import math
from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.adam import FIRST_MOMENT, MOMENT_RULES, SECOND_MOMENT, running_mean
from differ.replay.rules.base import Choices, Family, Hyper, Replayed, given, rule, rules

PRODUCT: Final = "mu_product"


class NAdam(Family):
    """See the module."""

    name = "nadam"
    elementwise = False
    updates = rules("nadam", decay=("none", "coupled", "decoupled"))
    moments: ClassVar = {FIRST_MOMENT: MOMENT_RULES, SECOND_MOMENT: MOMENT_RULES, PRODUCT: (rule(optimizer="nadam"),)}
    words: ClassVar = {("optimizer", "nadam"): "NAdam"}

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """Both moments and the product."""
        del hyper
        return kinds == {FIRST_MOMENT, SECOND_MOMENT, PRODUCT}

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """The gradient and the mean, each with its own momentum."""
        del w
        hyper = inputs.hyper
        product = float(given(inputs.held.state(PRODUCT)).block(0, 1)[0])
        now, ahead = _momentum(hyper, hyper.step), _momentum(hyper, hyper.step + 1)
        size = np.sqrt(inputs.state(SECOND_MOMENT, start) / (1.0 - hyper.beta2**hyper.step)) + hyper.eps
        g, m = inputs.g(start, choices), inputs.state(FIRST_MOMENT, start)
        update: Float64 = hyper.lr * ((1.0 - now) / (1.0 - product) * g + ahead / (1.0 - product * ahead) * m) / size
        return update

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """Those of Adam, and the product."""
        if inputs.kind == PRODUCT:
            before = inputs.before.block(start, start + BLOCK)
            return before * _momentum(inputs.hyper, inputs.hyper.step), np.zeros_like(before)
        return running_mean(inputs, choices, start)


def _momentum(hyper: Hyper, step: int) -> float:
    return hyper.beta1 * (1.0 - 0.5 * math.pow(0.96, step * hyper.get("momentum_decay", 4e-3)))
