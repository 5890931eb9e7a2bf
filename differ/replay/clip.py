"""Which clipping rule turns the recorded gradients into the recorded clipped ones.

    none        c = g
    value v     c = min(max(g, -v), v)                      element by element
    norm n      c = g * n / (|g| + 1e-6) where that is < 1   one norm over all tensors
    tensor n    the same with each tensor's own norm
    scale s     c = g * s                                    a factor above 1, which no clip gives

A side that does not clip at a step is consistent with every rule whose limit its gradients stay below, so a rule is
known either exactly or as "at least".  Sources: torch.nn.utils.clip_grad, mlx.optimizers.clip_grad_norm.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from differ.align import BLOCK, Tensor
from differ.compare import Float64
from differ.policy import ReplayTolerance
from differ.replay.fit import SMALLEST_NORMAL, Fit

# Added to the norm by both frameworks before they divide.
NORM_EPS: Final = 1e-6


class Clip(enum.StrEnum):
    """Kinds of clipping; the value is the id that a report uses."""

    NONE = "none"
    VALUE = "value"
    NORM = "norm"
    TENSOR = "tensor"
    SCALE = "scale"


@dataclass(frozen=True, slots=True)
class Limit:
    """The constant of a rule: exactly `value`, or (where nothing was clipped) any limit of at least `value`."""

    value: float
    exact: bool

    def agrees(self, other: Limit, tolerance: float) -> bool:
        """Whether one constant can be both."""
        slack = tolerance * max(self.value, other.value)
        if self.exact and other.exact:
            return abs(self.value - other.value) <= slack
        if self.exact or other.exact:
            exact, bound = (self, other) if self.exact else (other, self)
            return exact.value >= bound.value - slack
        return True


@dataclass(frozen=True, slots=True)
class ClipRules:
    """All rules that one side's step is consistent with; empty if no known rule gives it."""

    limits: Mapping[Clip, Limit] = field(default_factory=dict)
    margin: float = 0.0

    @property
    def known(self) -> bool:
        """Whether any rule fits."""
        return bool(self.limits)

    @property
    def identity(self) -> bool:
        """Whether nothing was changed at this step."""
        return self.known and not any(limit.exact for limit in self.limits.values())

    def agrees(self, other: ClipRules, tolerance: float) -> bool:
        """Whether one rule gives both sides."""
        common = set(self.limits) & set(other.limits)
        return any(self.limits[kind].agrees(other.limits[kind], tolerance) for kind in common)

    @property
    def named(self) -> tuple[Clip, float | None]:
        """The rule as a report names it, with its constant."""
        for kind in (Clip.VALUE, Clip.NORM, Clip.TENSOR, Clip.SCALE):
            limit = self.limits.get(kind)
            if limit is not None and limit.exact:
                return kind, tidy(limit.value)
        return Clip.NONE, None

    def sentence(self, side: str) -> str:
        """What this side does, in words."""
        if not self.known:
            return f"{side} follows no known clipping rule"
        return f"{side} {words(*self.named)}"


def words(kind: Clip, value: float | None) -> str:
    """What a side does under a rule, without the side."""
    return {
        Clip.NONE: "does not clip",
        Clip.VALUE: f"clips each element to ±{value}",
        Clip.NORM: f"clips by global norm at {value}",
        Clip.TENSOR: f"clips each tensor by its own norm at {value}",
        Clip.SCALE: f"multiplies all gradients by {value}",
    }[kind]


def tidy(value: float) -> float:
    """A fitted constant without the digits that float32 left uncertain: 0.99999994 is 1.0."""
    short = float(f"{value:.3g}")
    return short if abs(short - value) <= 2e-5 * abs(value) else float(f"{value:.5g}")


@dataclass(frozen=True, slots=True)
class ClippedTensor:
    """One tensor's gradient against its clipped one: norms, largest elements, and how each rule fits."""

    norm: float
    largest: float
    largest_clipped: float
    factor: float
    same: float
    value: float
    proportional: float
    eps: float

    @property
    def untouched(self) -> bool:
        """Whether it came out as it went in."""
        return self.same <= 1.0


def clipped_tensor(gradient: Tensor, clipped: Tensor, tolerance: ReplayTolerance) -> ClippedTensor:
    """Measure one tensor; `same`, `value` and `proportional` are margins, 1 being the limit."""
    gg = cg = largest = largest_clipped = 0.0
    for start in gradient.blocks():
        g, c = _finite(gradient, clipped, start)
        gg += float(np.dot(g, g))
        cg += float(np.dot(c, g))
        largest = max(largest, float(np.abs(g).max(initial=0.0)))
        largest_clipped = max(largest_clipped, float(np.abs(c).max(initial=0.0)))
    factor = cg / gg if gg > 0.0 else 1.0
    same, value, proportional = Fit(tolerance.spike), Fit(tolerance.spike), Fit(tolerance.spike)
    floor = SMALLEST_NORMAL.get(clipped.dtype, 0.0)
    for start in gradient.blocks():
        g, c = gradient.block(start, start + BLOCK), clipped.block(start, start + BLOCK)
        allowed = tolerance.ulp * tolerance.eps * np.abs(c) + floor
        same.add(start, c, g, allowed)
        value.add(start, c, np.clip(g, -largest_clipped, largest_clipped), allowed)
        proportional.add(start, c, factor * g, allowed)
    return ClippedTensor(
        math.sqrt(gg), largest, largest_clipped, factor, same.margin, value.margin, proportional.margin, tolerance.eps
    )


def _finite(gradient: Tensor, clipped: Tensor, start: int) -> tuple[Float64, Float64]:
    g, c = gradient.block(start, start + BLOCK), clipped.block(start, start + BLOCK)
    finite = np.isfinite(g) & np.isfinite(c)
    return (g, c) if finite.all() else (g[finite], c[finite])


def identify(tensors: list[ClippedTensor], tolerance: float) -> ClipRules:
    """All rules that a step's tensors are consistent with; `tolerance` is that of the constant, relative."""
    norm = math.hypot(*(tensor.norm for tensor in tensors))
    if all(tensor.untouched for tensor in tensors):
        largest = max((tensor.largest for tensor in tensors), default=0.0)
        own = max((tensor.norm for tensor in tensors), default=0.0)
        bounds = {Clip.VALUE: largest, Clip.NORM: norm, Clip.TENSOR: own}
        return ClipRules(
            {kind: Limit(bound, exact=False) for kind, bound in bounds.items()},
            max((tensor.same for tensor in tensors), default=0.0),
        )
    limits: dict[Clip, Limit] = {}
    limits |= _value_rule(tensors, tolerance)
    limits |= _norm_rule(tensors, norm)
    limits |= _tensor_rule(tensors, tolerance)
    return ClipRules(limits, max((tensor.value for tensor in tensors), default=0.0) if Clip.VALUE in limits else 0.0)


def _value_rule(tensors: list[ClippedTensor], tolerance: float) -> dict[Clip, Limit]:
    """Every clipped tensor ends at one constant, and no other tensor goes beyond it."""
    limit = max(tensor.largest_clipped for tensor in tensors if not tensor.untouched)
    slack = limit * (1.0 + tolerance)
    for tensor in tensors:
        if tensor.untouched and tensor.largest <= slack:
            continue
        if tensor.value > 1.0 or abs(tensor.largest_clipped - limit) > tolerance * limit:
            return {}
    return {Clip.VALUE: Limit(limit, exact=True)} if limit > 0.0 else {}


def _norm_rule(tensors: list[ClippedTensor], norm: float) -> dict[Clip, Limit]:
    """One factor over all tensors: below 1 the constant is factor * (norm + 1e-6)."""
    moved = [tensor for tensor in tensors if tensor.norm > 0.0]
    if not moved or any(tensor.proportional > 1.0 for tensor in tensors):
        return {}
    # The largest tensor's factor is the one that rounding disturbs least.
    factor = max(moved, key=lambda tensor: tensor.norm).factor
    if any(abs(tensor.factor - factor) > 8 * tensor.eps * abs(factor) for tensor in moved) or factor <= 0.0:
        return {}
    if factor > 1.0:
        return {Clip.SCALE: Limit(factor, exact=True)}
    return {Clip.NORM: Limit(factor * (norm + NORM_EPS), exact=True)}


def _tensor_rule(tensors: list[ClippedTensor], tolerance: float) -> dict[Clip, Limit]:
    """Every clipped tensor ends with one norm, and no other tensor's is larger."""
    clipped = [tensor for tensor in tensors if not tensor.untouched]
    ends = [tensor.factor * (tensor.norm + NORM_EPS) for tensor in clipped]
    limit = max(ends)
    fits = all(tensor.proportional <= 1.0 and 0.0 < tensor.factor < 1.0 for tensor in clipped)
    agree = all(
        abs(end - limit) <= max(tolerance, 8 * tensor.eps) * limit for end, tensor in zip(ends, clipped, strict=True)
    )
    below = all(tensor.norm <= limit * (1.0 + tolerance) for tensor in tensors if tensor.untouched)
    return {Clip.TENSOR: Limit(limit, exact=True)} if fits and agree and below else {}
