"""Replay many small tensors at once: a model has hundreds, and a replay of a few numbers costs mostly its calls.

Tensors of one side under the same settings are put end to end as soon as a rule has been asked for by a few of them; what each
of them then gets is what it would have got by itself.  Rules that look at a tensor as a whole are left alone, and so is
whatever is not finite.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from differ.align import SMALL, Tensor
from differ.policy import ReplayTolerance
from differ.replay.fit import Fit
from differ.replay.optimizer import MomentInputs, UpdateInputs
from differ.replay.rules import family_of
from differ.replay.rules.base import UNUSABLE, Held, Lacking, Rule

Inputs = UpdateInputs | MomentInputs
T = TypeVar("T")

# Elements that are put together at most, and how many tensors have to ask for a rule, or be there, first.
MOST: Final = 2**18
ASKED: Final = 2
FEWEST: Final = 4


def bundle(inputs: Iterable[Inputs | None]) -> None:
    """Let small tensors of one side that go together be replayed together."""
    groups: dict[tuple[object, ...], list[Inputs]] = {}
    for one in inputs:
        if one is not None and 0 < one.after.size <= SMALL:
            key = (type(one), one.kind, id(one.hyper), one.held.kinds, one.after.dtype, one.before.dtype)
            groups.setdefault(key, []).append(one)
    for members in groups.values():
        if len(members) >= FEWEST:
            joined = Bundle(members)
            for i, one in enumerate(members):
                one.share(partial(joined.fit, i))


def chunks(names: Sequence[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Names in portions of at most `MOST` elements, a large tensor by itself."""
    portion: list[T] = []
    held = 0
    for name in names:
        elements = size(name)
        if portion and held + elements > MOST:
            yield portion
            portion, held = [], 0
        portion.append(name)
        held += elements
    if portion:
        yield portion


class Bundle:
    """Tensors of one side, of one kind and under the same settings."""

    def __init__(self, members: Sequence[Inputs]) -> None:
        self._members = tuple(members)
        sizes = [one.after.size for one in members]
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._ends = np.cumsum(sizes)
        self._asked: Counter[Rule] = Counter()
        self._fits: dict[Rule, list[Fit] | None] = {}
        self._whole: Inputs | None = None

    def fit(self, i: int, how: Rule, tolerance: ReplayTolerance) -> Fit | None:
        """The fit of member `i`; None where it has to be replayed by itself."""
        if how not in self._fits:
            self._asked[how] += 1
            if self._asked[how] <= ASKED:
                return None
            self._fits[how] = self._replay(how, tolerance) if family_of(how).elementwise else None
        fits = self._fits[how]
        return None if fits is None else fits[i]

    def _replay(self, how: Rule, tolerance: ReplayTolerance) -> list[Fit] | None:
        try:
            if self._whole is None:
                first = self._members[0]
                before, after = (_joined([getattr(one, side) for one in self._members]) for side in ("before", "after"))
                self._whole = replace(first, before=before, after=after, held=_JoinedHeld(self._members))
            ((_, recorded, expected, allowed),) = self._whole.blocks(how, tolerance)
        except UNUSABLE:
            return None
        residual = np.abs(recorded - expected)
        allowed = np.broadcast_to(allowed, residual.shape)
        if not (np.isfinite(residual).all() and np.isfinite(allowed).all()):
            return None
        share = residual / allowed
        left, room = (np.add.reduceat(np.square(values), self._starts) for values in (residual, allowed))
        fits = []
        for i, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            at = int(share[start:end].argmax())
            largest = float(share[start + at])
            fit = Fit(tolerance.spike, float(left[i]), float(room[i]))
            if largest > 0.0:
                fit.largest, fit.at = largest, at
                fit.recorded, fit.expected = float(recorded[start + at]), float(expected[start + at])
            fits.append(fit)
        return fits


class _JoinedHeld:
    """What several tensors' traces hold, put end to end."""

    def __init__(self, members: Sequence[Inputs]) -> None:
        self._held = [one.held for one in members]
        self._sizes = [one.after.size for one in members]
        self.kinds = self._held[0].kinds
        self._known: dict[object, Tensor] = {}

    @property
    def gradient(self) -> Tensor:
        return self._join("gradient", lambda held: held.gradient)

    @property
    def parameter(self) -> Tensor:
        return self._join("parameter", lambda held: held.parameter)

    def state(self, kind: str) -> Tensor:
        return self._join(("state", kind), lambda held: held.state(kind))

    def earlier(self, kind: str) -> Tensor:
        return self._join(("earlier", kind), lambda held: held.earlier(kind))

    def remember(self, key: object, compute: Callable[[], Any]) -> Any:
        del key
        return compute()

    def _join(self, key: object, read: Callable[[Held], Tensor | None]) -> Tensor:
        if key not in self._known:
            found = [read(held) for held in self._held]
            if any(tensor is not None and tensor.size != n for tensor, n in zip(found, self._sizes, strict=True)):
                raise Lacking
            self._known[key] = _joined(found)
        return self._known[key]


def _joined(tensors: Sequence[Tensor | None]) -> Tensor:
    """Tensors end to end; raises Lacking where one is missing or of another dtype."""
    found = [tensor for tensor in tensors if tensor is not None]
    if len(found) < len(tensors) or len({tensor.dtype for tensor in found}) != 1:
        raise Lacking
    return Tensor(np.concatenate([tensor.stored.reshape(-1) for tensor in found]), found[0].dtype)
