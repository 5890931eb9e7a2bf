"""Replay an optimizer's step from its recorded inputs: which rules may give the outputs, and how well one of them does.

    update   after = w (1 - decay) - update(state after, gradient, settings)
    moment   after = kept(state before) + taken(gradient)

in float64, each within what rounding may cost in the dtype of the run.  The rules themselves are in `differ.replay.rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.policy import ReplayTolerance
from differ.replay.fit import SMALLEST_NORMAL, Fit
from differ.replay.rules import family_of
from differ.replay.rules.base import UNUSABLE, Replayed, Rule

# Start, recorded, replayed, what each element may be off by.
Block = tuple[int, Float64, Float64, Float64]
# Times its allowance that a rule misses what a like rule gives, so that it is told apart from it.
FAR: Final = 8.0


@dataclass(frozen=True)
class _Inputs(Replayed):
    """What updates and moments have in common."""

    def fit(self, how: Rule, tolerance: ReplayTolerance) -> Fit:
        """How well a rule gives the recorded output; not at all where it needs what was not recorded."""
        shared: Callable[[Rule, ReplayTolerance], Fit | None] | None = self.__dict__.get("_shared")
        found = None if shared is None else shared(how, tolerance)
        return self._fit(how, tolerance) if found is None else found

    def share(self, fit: Callable[[Rule, ReplayTolerance], Fit | None]) -> None:
        """Let a fit come from elsewhere, if it does.  A changed copy of these inputs knows nothing of it."""
        self.__dict__["_shared"] = fit

    def blocks(self, how: Rule, tolerance: ReplayTolerance) -> Iterator[Block]:
        """The replay, block by block."""
        raise NotImplementedError

    def _fit(self, how: Rule, tolerance: ReplayTolerance) -> Fit:
        fit = Fit(tolerance.spike)
        try:
            for block in self.blocks(how, tolerance):
                fit.add(*block)
        except UNUSABLE:
            return Fit.none(tolerance.spike)
        return fit


@dataclass(frozen=True)
class UpdateInputs(_Inputs):
    """One parameter's update: the parameter before and after."""

    def blocks(self, how: Rule, tolerance: ReplayTolerance) -> Iterator[Block]:
        """The parameter under a rule."""
        family, choices = family_of(how), dict(how)
        floor = SMALLEST_NORMAL.get(self.after.dtype, 0.0)
        decay = family.decay(self, choices)
        for start in self.after.blocks():
            w = self.before.block(start, start + BLOCK)
            after = self.after.block(start, start + BLOCK)
            update = family.update(self, choices, start, w)
            rounding = tolerance.ulp * tolerance.eps * np.maximum(np.abs(w), np.abs(after))
            allowed = rounding + tolerance.relative * np.abs(update) + floor
            yield start, after, w * (1.0 - decay) - update, allowed + family.slack(self, choices, start, update)

    def _fit(self, how: Rule, tolerance: ReplayTolerance) -> Fit:
        family, choices = family_of(how), dict(how)
        length = family.length(choices)
        if length is None:
            return super()._fit(how, tolerance)
        fit = Fit(math.inf, length=length)
        try:
            if self._closer_gives(how, tolerance):
                return Fit.none(tolerance.spike)
            for start, after, expected, allowed in self.blocks(how, tolerance):
                fit.add(start, after, expected, allowed)
                w = self.before.block(start, start + BLOCK)
                fit.add_along(expected - after, family.update(self, choices, start, w))
        except UNUSABLE:
            return Fit.none(tolerance.spike)
        return fit

    def _closer_gives(self, how: Rule, tolerance: ReplayTolerance) -> bool:
        """Whether the like rule without noise gives the output where this one, without its noise, is far off."""
        closer = family_of(how).closer(dict(how))
        if closer is None:
            return False
        exact, noisy = Fit(tolerance.spike), Fit(tolerance.spike)
        for (start, after, given, allowed), (_, _, expected, _) in zip(
            self.blocks(closer, tolerance), self.blocks(how, tolerance), strict=True
        ):
            exact.add(start, after, given, allowed)
            noisy.add(start, after, expected, allowed)
        return exact.ok and noisy.margin > FAR


@dataclass(frozen=True)
class MomentInputs(_Inputs):
    """One moment, before and after."""

    def blocks(self, how: Rule, tolerance: ReplayTolerance) -> Iterator[Block]:
        """The moment under a rule."""
        family, choices = family_of(how), dict(how)
        floor = SMALLEST_NORMAL.get(self.after.dtype, 0.0)
        for start in self.after.blocks():
            kept, taken = family.moment(self, choices, start)
            size = np.abs(taken)
            # 1 - b2 loses digits where b2 is held in float32: 1.3e-5 of what is taken in.
            rounding = 2 * tolerance.ulp * tolerance.eps * (np.abs(kept) + size)
            allowed = rounding + tolerance.relative * size + floor
            yield start, self.after.block(start, start + BLOCK), kept + taken, allowed


def update_block(inputs: UpdateInputs, how: Rule, start: int, before: Float64) -> Float64:
    """What a rule subtracts from one block of the parameter `before` the update, decoupled decay aside."""
    return family_of(how).update(inputs, dict(how), start, before)
