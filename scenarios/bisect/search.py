"""All independent minimal sets: ddmin again and again, each time from where the last one ended.

A set that was found is moved into the base before the search goes on, so that the next one is looked for between
`a + what was found` and `b`.  That ends when the base is the same as `b`: what was found is then sufficient, a change that
matters only together with one that was found is found too, and one that the found ones make meaningless is not named.
Invariant: every found set is 1-minimal with respect to the base that it was found from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from scenarios.bisect.ddmin import Outcome, ddmin

R = TypeVar("R")
Keys = frozenset[str]


@dataclass(frozen=True, slots=True)
class Compared(Generic[R]):
    """Answer of an oracle: the outcome, and what it was read from."""

    outcome: Outcome
    detail: R


@dataclass(frozen=True, slots=True)
class Found(Generic[R]):
    """One minimal set: `keys` together make `base + keys` diverge from `base`; `detail` says how."""

    keys: tuple[str, ...]
    base: Keys
    detail: R


@dataclass(slots=True)
class Search(Generic[R]):
    """State of a search, readable while it runs and after it was stopped.

    `compare(x, y)` compares the run with the changes `x` of b and the one with `y`; it remembers what it was asked.
    `suspects(detail, keys)` returns the likely ones among `keys`.  `candidates` is the smallest failing set so far.
    """

    items: tuple[str, ...]
    compare: Callable[[Keys, Keys], Compared[R]]
    suspects: Callable[[R, Sequence[str]], Sequence[str]] = lambda _, __: ()
    found: list[Found[R]] = field(default_factory=list)
    candidates: tuple[str, ...] = ()
    complete: bool = False

    @property
    def base(self) -> Keys:
        """Everything that was found."""
        return frozenset(key for found in self.found for key in found.keys)

    @property
    def rest(self) -> tuple[str, ...]:
        """What was not found to matter: harmless once the search is complete."""
        return tuple(key for key in self.items if key not in self.base)

    def run(self) -> None:
        """Search to the end.  Whatever `compare` raises goes through and leaves the state as it is."""
        everything = frozenset(self.items)
        while self.rest:
            whole = self.compare(self.base, everything)
            if whole.outcome is not Outcome.DIVERGED:
                self.complete = whole.outcome is Outcome.SAME
                return
            self._next(whole.detail)
        self.complete = True

    def _next(self, whole: R) -> None:
        base = self.base
        likely = [key for key in self.suspects(whole, self.rest) if key in self.rest]
        ordered = (*likely, *(key for key in self.rest if key not in likely))
        self._reduced(ordered)

        def test(keys: tuple[str, ...]) -> Outcome:
            return self.compare(base, base | set(keys)).outcome

        keys = ddmin(ordered, test, suspects=len(likely), reduced=self._reduced)
        detail = self.compare(base, base | set(keys)).detail
        self.found.append(Found(tuple(key for key in self.items if key in keys), base, detail))
        self.candidates = ()

    def _reduced(self, keys: tuple[str, ...]) -> None:
        self.candidates = keys
