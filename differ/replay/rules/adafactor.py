"""Adafactor: the second moment of a matrix as a row and a column.

    u = g^2 + eps1, b = 1 - t^decay_rate
    row    b row' + (1 - b) mean of u over columns         col    likewise over rows; a vector keeps exp_avg_sq whole
    step   g / sqrt(row col / mean(row)), divided by max(1, rms(step) / clip_threshold)
    rate   lr | min(1e-2, 1 / sqrt(t)) relative | min(1e-6 t, 1 / sqrt(t)) warm-up | min(lr, 1 / sqrt(t)) capped,
           times max(eps2, rms(w)) where it is scaled
    mean   with a first moment: exp_avg = b1 exp_avg' + (1 - b1) rate step, which is then subtracted
    decay  of w by the rate (transformers, MLX) or by lr (torch), before the update

torch keeps `row_var`, `col_var` and `variance`, adds no eps1 to g^2 and holds the product above eps1^2 instead.

Sources: transformers.Adafactor, mlx.optimizers.Adafactor, torch.optim.Adafactor; Shazeer & Stern 2018, arXiv:1804.04235.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.adam import FIRST_MOMENT, SECOND_MOMENT
from differ.replay.rules.base import Choices, Family, Hyper, Lacking, Replayed, given, rms, rule, rules, whole
from tracer.dtypes import EPSILON

ROWS: Final = ("exp_avg_sq_row", "row_var")
COLUMNS: Final = ("exp_avg_sq_col", "col_var")
WHOLE: Final = (SECOND_MOMENT, "variance")
# transformers' own copy of rms(w).
SIZE: Final = "RMS"
_TORCH: Final = frozenset({"row_var", "col_var", "variance"})
_SECOND: Final = (rule(optimizer="adafactor"),)


class Adafactor(Family):
    """See the module."""

    name = "adafactor"
    elementwise = False
    updates = rules(
        "adafactor",
        rate=("lr", "relative", "capped", "warmup"),
        scaled=("yes", "no"),
        decay=("none", "rate", "decoupled"),
    )
    moments: ClassVar = {
        **dict.fromkeys((*ROWS, *COLUMNS, *WHOLE, SIZE), _SECOND),
        FIRST_MOMENT: rules("adafactor", rate=("lr", "relative", "capped", "warmup"), scaled=("yes", "no")),
    }
    words: ClassVar = {
        ("optimizer", "adafactor"): "Adafactor",
        ("rate", "lr"): "the learning rate itself",
        ("rate", "relative"): "a relative step size",
        ("rate", "warmup"): "a relative step size with warm-up",
        ("rate", "capped"): "the learning rate, at most 1/√t",
        ("scaled", "yes"): "steps scaled by the parameter's size",
        ("scaled", "no"): "steps not scaled by the parameter's size",
        ("decay", "rate"): "weights decayed by the scaled step size",
    }

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """A row and a column, or all of a vector; a decay rate that grows with the step."""
        second = kinds - {FIRST_MOMENT, SIZE}
        known = ({ROWS[0], COLUMNS[0]}, {ROWS[1], COLUMNS[1]}, {WHOLE[0]}, {WHOLE[1]})
        return second in known and bool(hyper.more.keys() & {"decay_rate", "beta2_decay"})

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """The step times its rate, or the mean of those."""
        if FIRST_MOMENT in inputs.held.kinds:
            return inputs.state(FIRST_MOMENT, start)
        step = _step(inputs).reshape(-1)[start : start + w.size]
        update: Float64 = _rate(inputs, choices) * step
        return update

    def decay(self, inputs: Replayed, choices: Choices) -> float:
        """By the rate, or by lr."""
        if choices["decay"] == "rate":
            return _rate(inputs, choices) * inputs.hyper.weight_decay
        return super().decay(inputs, choices)

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """One of the second moments, the first, or rms(w)."""
        before = inputs.before.block(start, start + BLOCK)
        if inputs.kind == SIZE:
            return np.zeros(1), np.array([rms(whole(given(inputs.held.parameter)))])
        if inputs.kind == FIRST_MOMENT:
            step = _step(inputs).reshape(-1)[start : start + BLOCK]
            return inputs.hyper.beta1 * before, (1.0 - inputs.hyper.beta1) * _rate(inputs, choices) * step
        new = _share_of_new(inputs)
        return (1.0 - new) * before, new * _squares(inputs).reshape(-1)[start : start + BLOCK]


def _share_of_new(inputs: Replayed) -> float:
    """1 - b of this step."""
    more = inputs.hyper.more
    exponent = more["decay_rate"] if "decay_rate" in more else more["beta2_decay"]
    return math.pow(inputs.hyper.step, exponent)


def _squares(inputs: Replayed) -> Float64:
    """What the moment of `kind` takes in."""
    squares = np.square(inputs.whole_g({}))
    if inputs.kind not in _TORCH:
        squares = squares + inputs.hyper.get("eps1", 1e-30)
    if inputs.kind in ROWS or inputs.kind in COLUMNS:
        if squares.ndim < 2:
            raise Lacking
        squares = np.asarray(squares.mean(axis=-1 if inputs.kind in ROWS else -2))
    if squares.size != inputs.after.size:
        raise Lacking
    return squares


def _step(inputs: Replayed) -> Float64:
    """The normalised gradient, clipped by its root mean square."""
    found: Float64 = inputs.held.remember("adafactor step", lambda: _compute_step(inputs))
    return found


def _compute_step(inputs: Replayed) -> Float64:
    g, held, hyper = inputs.whole_g({}), inputs.held, inputs.hyper
    if g.shape != inputs.after.shape:
        raise Lacking
    least = 0.0
    if held.kinds & _TORCH:
        eps1 = hyper.get("eps1", EPSILON.get(inputs.after.dtype, 0.0))
        least = eps1 * eps1
    if held.kinds & {*WHOLE}:
        second = whole(given(held.state(next(iter(held.kinds & {*WHOLE})))))
        if second.shape != g.shape:
            raise Lacking
    else:
        row, col = (whole(given(held.state(next(iter(held.kinds & {*both}))))) for both in (ROWS, COLUMNS))
        if g.ndim < 2 or row.size * g.shape[-1] != g.size or col.size * g.shape[-2] != g.size:
            raise Lacking
        row, col = row.reshape(*g.shape[:-1], 1), col.reshape(*g.shape[:-2], 1, g.shape[-1])
        mean = row.mean(axis=-2, keepdims=True)
        second = row * col / (np.maximum(mean, np.sqrt(least)) if least else mean)
    step = g / np.sqrt(np.maximum(second, least))
    limit = hyper.get("clip_threshold", hyper.get("d", 1.0))
    return np.asarray(step / max(1.0, rms(step) / limit))


def _rate(inputs: Replayed, choices: Choices) -> float:
    hyper = inputs.hyper
    root = 1.0 / math.sqrt(hyper.step)
    rate = {
        "lr": hyper.lr,
        "relative": min(1e-2, root),
        "warmup": min(1e-6 * hyper.step, root),
        "capped": min(hyper.lr, root),
    }[choices["rate"]]
    if choices["scaled"] == "no":
        return rate
    size = inputs.held.remember("rms of the parameter", lambda: rms(whole(given(inputs.held.parameter))))
    return rate * max(hyper.get("eps2", 1e-3), float(size))
