"""Replay an optimizer's step from its recorded inputs, and list the rules that give the recorded outputs.

Adam family (g clipped gradient, w parameter before, m = exp_avg and v = exp_avg_sq after this update, t its number):

    moments      m = b1 m' + (1 - b1) g          v = b2 v' + (1 - b2) g^2       coupled decay: g + wd w instead of g
    correction   yes: m / (1 - b1^t), v / (1 - b2^t)        no: m, v as they are
    update       lr m^ / (sqrt(v^) + eps)                    eps outside (torch, MLX)
                 lr m^ / sqrt(v^ + eps)                      inside
                 lr m^ sqrt(c2) / (sqrt(v) + eps)            before the correction of v, c2 = 1 - b2^t
    decay        decoupled: w (1 - lr wd) - update           none: w - update

SGD (mu momentum, d dampening): buffer = mu buffer' + (1 - d) g, torch's first buffer is g itself; step lr * buffer, or
lr (g + mu buffer) with Nesterov.  Sources: torch.optim.Adam/AdamW/SGD, mlx.optimizers.Adam/AdamW/SGD.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.align import BLOCK, Tensor
from differ.compare import Float64
from differ.policy import ReplayTolerance
from differ.replay.fit import SMALLEST_NORMAL, Fit

FIRST_MOMENT: Final = "exp_avg"
SECOND_MOMENT: Final = "exp_avg_sq"
# torch's name and MLX's.
MOMENTUM: Final = ("momentum_buffer", "v")


@dataclass(frozen=True, slots=True)
class Hyper:
    """Settings of one parameter's group at one step; `step` counts the optimizer's updates, this one included."""

    lr: float
    step: int
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0


# A rule is a set of choices by aspect, as sorted pairs: (("correction", "yes"), ("decay", "none"), ("eps", "outside")).
Rule = tuple[tuple[str, str], ...]


def rule(**choices: str) -> Rule:
    """A rule from its choices."""
    return tuple(sorted(choices.items()))


def differing_aspects(a: Rule, b: Rule) -> frozenset[str]:
    """Aspects in which two rules of one family differ."""
    return frozenset(key for key, value in a if dict(b).get(key) != value)


ADAM_RULES: Final[tuple[Rule, ...]] = tuple(
    rule(correction=correction, decay=decay, eps=eps)
    for eps, correction, decay in itertools.product(
        ("outside", "inside", "before"), ("yes", "no"), ("decoupled", "none")
    )
)
SGD_RULES: Final[tuple[Rule, ...]] = tuple(
    rule(nesterov=nesterov, decay=decay)
    for nesterov, decay in itertools.product(("no", "yes"), ("coupled", "decoupled", "none"))
)
MOMENT_RULES: Final[tuple[Rule, ...]] = (rule(decay="none"), rule(decay="coupled"))
MOMENTUM_RULES: Final[tuple[Rule, ...]] = tuple(
    rule(decay=decay, first=first) for decay, first in itertools.product(("none", "coupled"), ("whole", "dampened"))
)

# Where several rules fit, the report names the first of these.
ORDER: Final = {how: i for i, how in enumerate((*ADAM_RULES, *SGD_RULES, *MOMENT_RULES, *MOMENTUM_RULES))}

# Words for a report.
SENTENCES: Final = {
    ("correction", "yes"): "bias correction",
    ("correction", "no"): "no bias correction",
    ("decay", "decoupled"): "decoupled weight decay",
    ("decay", "coupled"): "weight decay added to the gradient",
    ("decay", "none"): "no weight decay",
    ("eps", "outside"): "eps added to the corrected root",
    ("eps", "inside"): "eps inside the root",
    ("eps", "before"): "eps added before the correction",
    ("nesterov", "yes"): "Nesterov momentum",
    ("nesterov", "no"): "plain momentum",
    ("first", "whole"): "first buffer undampened",
    ("first", "dampened"): "first buffer dampened",
}


@dataclass(frozen=True)
class UpdateInputs:
    """One parameter's update: before, after, moments after the update.

    For SGD `first` is the momentum buffer (None without momentum), `second` is None and the clipped `gradient` is given;
    Adam's update does not read it.
    """

    before: Tensor
    after: Tensor
    gradient: Tensor | None
    first: Tensor | None
    second: Tensor | None
    hyper: Hyper

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules of the family that the state belongs to."""
        return ADAM_RULES if self.second is not None else SGD_RULES

    def fit(self, how: Rule, tolerance: ReplayTolerance) -> Fit:
        """How well a rule gives the recorded parameter."""
        return fit_update(self, how, tolerance)


@dataclass(frozen=True)
class MomentInputs:
    """One moment: before, after, the clipped gradient that it takes in, the parameter before the update."""

    kind: str
    before: Tensor
    after: Tensor
    gradient: Tensor
    parameter: Tensor | None
    hyper: Hyper

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Rules of that kind of moment."""
        return MOMENTUM_RULES if self.kind in MOMENTUM else MOMENT_RULES

    def fit(self, how: Rule, tolerance: ReplayTolerance) -> Fit:
        """How well a rule gives the recorded moment."""
        return fit_moment(self, how, tolerance)


def fit_update(inputs: UpdateInputs, how: Rule, tolerance: ReplayTolerance) -> Fit:
    """How well a rule gives the recorded parameter."""
    choices = dict(how)
    fit = Fit(tolerance.spike)
    floor = SMALLEST_NORMAL.get(inputs.after.dtype, 0.0)
    for start in inputs.after.blocks():
        w = inputs.before.block(start, start + BLOCK)
        after = inputs.after.block(start, start + BLOCK)
        update = update_block(inputs, how, start, w)
        decay = inputs.hyper.lr * inputs.hyper.weight_decay if choices["decay"] == "decoupled" else 0.0
        expected = w * (1.0 - decay) - update
        rounding = tolerance.ulp * tolerance.eps * np.maximum(np.abs(w), np.abs(after))
        fit.add(start, after, expected, rounding + tolerance.relative * np.abs(update) + floor)
    return fit


def update_block(inputs: UpdateInputs, how: Rule, start: int, before: Float64) -> Float64:
    """What a rule subtracts from one block of the parameter `before` the update, decoupled decay aside."""
    step = _adam_step if inputs.second is not None else _sgd_step
    return step(inputs, dict(how), start, before)


def _adam_step(inputs: UpdateInputs, choices: dict[str, str], start: int, _w: Float64) -> Float64:
    hyper = inputs.hyper
    assert inputs.first is not None
    assert inputs.second is not None
    m, v = inputs.first.block(start, start + BLOCK), inputs.second.block(start, start + BLOCK)
    corrected = choices["correction"] == "yes"
    c1 = 1.0 - hyper.beta1**hyper.step if corrected else 1.0
    c2 = 1.0 - hyper.beta2**hyper.step if corrected else 1.0
    if choices["eps"] == "inside":
        denominator = np.sqrt(v / c2 + hyper.eps)
    elif choices["eps"] == "before":
        denominator = (np.sqrt(v) + hyper.eps) / math.sqrt(c2)
    else:
        denominator = np.sqrt(v) / math.sqrt(c2) + hyper.eps
    update: Float64 = hyper.lr * (m / c1) / denominator
    # 0 / 0 is what an optimizer without eps leaves behind as nan, and the recorded parameter then says so.
    return update


def _sgd_step(inputs: UpdateInputs, choices: dict[str, str], start: int, w: Float64) -> Float64:
    hyper = inputs.hyper
    coupled = hyper.weight_decay * w if choices["decay"] == "coupled" else np.zeros(1)
    if inputs.first is None:
        assert inputs.gradient is not None
        return hyper.lr * (inputs.gradient.block(start, start + BLOCK) + coupled)
    buffer = inputs.first.block(start, start + BLOCK)
    if choices["nesterov"] == "no":
        return hyper.lr * buffer
    assert inputs.gradient is not None
    return hyper.lr * (inputs.gradient.block(start, start + BLOCK) + coupled + hyper.momentum * buffer)


def fit_moment(inputs: MomentInputs, how: Rule, tolerance: ReplayTolerance) -> Fit:
    """How well a rule gives the recorded moment."""
    keep, take, square = _recurrence(inputs, dict(how))
    coupled = inputs.hyper.weight_decay if dict(how)["decay"] == "coupled" else 0.0
    fit = Fit(tolerance.spike)
    floor = SMALLEST_NORMAL.get(inputs.after.dtype, 0.0)
    for start in inputs.after.blocks():
        g = inputs.gradient.block(start, start + BLOCK)
        if coupled and inputs.parameter is not None:
            g = g + coupled * inputs.parameter.block(start, start + BLOCK)
        kept, taken = keep * inputs.before.block(start, start + BLOCK), take * square(g)
        # 1 - b2 loses digits where b2 is held in float32: 1.3e-5 of what is taken in.
        rounding = 2 * tolerance.ulp * tolerance.eps * (np.abs(kept) + np.abs(taken))
        allowed = rounding + tolerance.relative * np.abs(taken) + floor
        fit.add(start, inputs.after.block(start, start + BLOCK), kept + taken, allowed)
    return fit


def _recurrence(inputs: MomentInputs, choices: dict[str, str]) -> tuple[float, float, Callable[[Float64], Float64]]:
    """Factor of the state before, factor of what is taken in, and what is done to the gradient."""
    hyper = inputs.hyper
    if inputs.kind == FIRST_MOMENT:
        return hyper.beta1, 1.0 - hyper.beta1, np.positive
    if inputs.kind == SECOND_MOMENT:
        return hyper.beta2, 1.0 - hyper.beta2, np.square
    if choices["first"] == "whole" and hyper.step <= 1:
        return 0.0, 1.0, np.positive
    return hyper.momentum, 1.0 - hyper.dampening, np.positive
