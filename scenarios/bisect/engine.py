"""A bisection from start to end: is a reproducible, how many steps show the difference, which changes make it.

The engine wires the search to real runs.  It prints nothing; what it did is one `Report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from scenarios.bisect.ddmin import Outcome
from scenarios.bisect.report import Named, Report, Unresolved
from scenarios.bisect.runs import DIVERGED, FAILED, SAME, Answer, BudgetSpent, Runs
from scenarios.bisect.search import Compared, Found, Keys, Search
from scenarios.bisect.space import Item, Space, shown
from scenarios.bisect.suspects import suspects
from scenarios.launch import RunFailed
from tracer.errors import BadUsage, TraceError

_OUTCOMES = {SAME: Outcome.SAME, DIVERGED: Outcome.DIVERGED}


class NotReproducible(TraceError):
    """A run that differs from itself: no setting can be blamed for a divergence."""

    slug = "not-reproducible"


@dataclass(slots=True)
class Bisection:
    """One bisection.  `steps` is where it starts, doubled up to `max_steps` while the whole of b is the same as a.

    `planned` is called once, after the first run and with the seconds that it took.
    """

    space: Space
    runs: Runs
    steps: int = 2
    max_steps: int = 8
    check_repeat: bool = True
    planned: Callable[[float], None] = lambda _: None
    _search: Search[Answer] | None = None
    _unresolved: dict[tuple[str, ...], str] = field(default_factory=dict)
    _latest: Keys = frozenset()
    _items: tuple[Item, ...] = ()

    def run(self) -> Report:
        """Bisect; a budget that is spent ends it with what was found so far.

        Raises RunFailed where a or b cannot be run, NotReproducible, and BadUsage if they have nothing in common.
        """
        self._items = self.space.items()
        if not self._items:
            return self._report(SAME, complete=True)
        spent = ""
        verdict = ""
        try:
            verdict = self._find_steps()
            if verdict == DIVERGED:
                keys = tuple(item.key for item in self._items)
                self._search = Search(keys, self._compared, suspects)
                self._search.run()
        except BudgetSpent as error:
            spent = error.line()
        complete = not spent and (self._search is None or self._search.complete)
        return self._report(verdict, complete=complete, spent=spent)

    def _find_steps(self) -> str:
        """Verdict on the whole of a and b, at the first number of steps that tells them apart."""
        everything = frozenset(item.key for item in self._items)
        self._run_a()
        while True:
            answer = self._compare(frozenset(), everything)
            if answer.verdict == FAILED:
                raise RunFailed(f"b cannot be run: {answer.error}")
            if answer.verdict not in _OUTCOMES:
                raise BadUsage("a and b have nothing in common that could be compared", "bisect two runs of one kind")
            if answer.verdict == DIVERGED or self.steps >= self.max_steps:
                return answer.verdict
            self.steps = min(self.steps * 2, self.max_steps)

    def _run_a(self) -> None:
        """Run a, and once more: a run that differs from itself would make every setting look guilty."""
        first = self.space.job((), self.steps)
        before = self.runs.counts.seconds
        try:
            self.runs.trace(first, "a")
        except RunFailed as error:
            raise RunFailed(f"a cannot be run: {error}", error.hint) from error
        self.planned(self.runs.counts.seconds - before)
        if not self.check_repeat:
            return
        answer = self.runs.compare(first, self.space.job((), self.steps).again(), "a once more")
        if answer.verdict != SAME:
            place = f" at step {answer.first['step']}, {answer.first['phase']}" if answer.first is not None else ""
            raise NotReproducible(
                f"a differs from itself when it is run again{place}",
                "make the run deterministic, or give a wider --policy",
            )

    def _compare(self, base: Keys, chosen: Keys) -> Answer:
        new = [item for item in self._items if item.key in chosen - base]
        a, b = self.space.job(base, self.steps), self.space.job(chosen, self.steps)
        answer = self.runs.compare(a, b, shown(new))
        if answer.verdict == DIVERGED:
            self._latest = chosen
        self._forget(base, chosen)
        return answer

    def _compared(self, base: Keys, chosen: Keys) -> Compared[Answer]:
        answer = self._compare(base, chosen)
        outcome = _OUTCOMES.get(answer.verdict, Outcome.UNRESOLVED)
        if outcome is Outcome.UNRESOLVED:
            new = tuple(item.key for item in self._items if item.key in chosen - base)
            self._unresolved[new] = answer.error or answer.verdict
        return Compared(outcome, answer)

    def _forget(self, *bases: Keys) -> None:
        """Keep what may be a base again: a, b, the base, and the smallest set that was seen to diverge."""
        everything = frozenset(item.key for item in self._items)
        kept: Iterable[Keys] = (frozenset(), everything, bases[0], self._latest)
        self.runs.forget_traces(*(self.space.job(keys, self.steps) for keys in kept))

    def _report(self, verdict: str, *, complete: bool, spent: str = "") -> Report:
        search = self._search
        found = tuple(self._named(one) for one in search.found) if search is not None else ()
        rest = search.rest if search is not None else tuple(item.key for item in self._items)
        candidates = search.candidates if search is not None and not complete else ()
        return Report(
            verdict=verdict or "unknown",
            complete=complete,
            space=self.space,
            steps=self.steps,
            items=self._items,
            found=found,
            rest=rest,
            candidates=candidates,
            unresolved=tuple(Unresolved(keys, error) for keys, error in self._unresolved.items()),
            counts=self.runs.counts,
            environments=self.runs.environments.made,
            spent=spent,
        )

    def _named(self, found: Found[Answer]) -> Named:
        items = tuple(item for item in self._items if item.key in found.keys)
        return Named(items, found.detail.first, found.detail.causes, tuple(sorted(found.base)))
