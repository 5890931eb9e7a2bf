"""Delta debugging: a 1-minimal subset that still fails.

The algorithm is ddmin of A. Zeller and R. Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE
Transactions on Software Engineering 28 (2), 2002, section 3: split into n parts, go on with a part that fails, else with
the rest of one, else split finer, until the parts are single items.  It must never assume that a subset of a set that passes
passes too; a test without an answer counts as "does not fail".
Invariant: `test(result)` failed, and no set that lacks just one of its items did.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Outcome(enum.Enum):
    """What a test of a subset said: DIVERGED is the paper's "fail", SAME its "pass"."""

    SAME = "same"
    DIVERGED = "diverged"
    UNRESOLVED = "unresolved"


Test = Callable[[tuple[T, ...]], Outcome]


def ddmin(
    items: Sequence[T],
    test: Test[T],
    *,
    suspects: int = 0,
    reduced: Callable[[tuple[T, ...]], None] = lambda _: None,
) -> tuple[T, ...]:
    """A 1-minimal subset of `items` for which `test` says DIVERGED, in their order; `test(items)` must have said so.

    `suspects`: so many items at the front are the likely ones, and are the first part that is tried.  `reduced` is told every
    smaller set that fails as soon as it is known.  A set may be tested twice: `test` remembers, if that is dear.
    """
    current = tuple(items)
    if 0 < suspects < len(current) and test(current[:suspects]) is Outcome.DIVERGED:
        current = current[:suspects]
        reduced(current)
    parts = 2
    while len(current) >= 2:
        smaller, finer = _reduce(current, test, parts)
        if smaller is None:
            if parts >= len(current):
                break
            parts = min(len(current), 2 * parts)
            continue
        current, parts = smaller, min(len(smaller), finer)
        reduced(current)
    return current


def _reduce(current: tuple[T, ...], test: Test[T], parts: int) -> tuple[tuple[T, ...] | None, int]:
    """A smaller failing set and the number of parts to go on with; None where there is none at this granularity."""
    chunks = split(current, parts)
    for chunk in chunks:
        if test(chunk) is Outcome.DIVERGED:
            return chunk, 2
    if parts > 2:  # of two parts, each is the other's complement
        for chunk in chunks:
            rest = tuple(item for item in current if item not in chunk)
            if test(rest) is Outcome.DIVERGED:
                return rest, max(parts - 1, 2)
    return None, parts


def split(items: Sequence[T], parts: int) -> list[tuple[T, ...]]:
    """`parts` consecutive pieces whose sizes differ by one at most; none is empty if there are enough items."""
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [tuple(items[low:high]) for low, high in itertools.pairwise(bounds)]
