"""A sweep from plan to table: what the cache knows is not run again, what comes in is kept at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from scenarios.bisect.store import Store
from scenarios.sweep.plan import Plan, Task
from scenarios.sweep.spread import Spread
from scenarios.sweep.table import Table, make_table
from scenarios.sweep.work import Result

CELLS: Final = "cells"


@dataclass(slots=True)
class Sweep:
    """A sweep.  `runs` and `seconds` count what was recorded now; `told` is called after each result."""

    plan: Plan
    spread: Spread
    store: Store
    told: Callable[[int, int], None] = lambda *_: None
    runs: int = 0
    known: int = 0
    results: list[Result] = field(default_factory=list)

    def pending(self) -> list[tuple[Task, str]]:
        """Tasks that the cache does not know, with their keys; takes what it knows."""
        pending = []
        for task in self.plan.tasks():
            key = task.key(repr(self.spread.policy))
            known = self.store.read(CELLS, key)
            if known is None:
                pending.append((task, key))
                continue
            self.results.append(Result(task.cell, task.seed, task.column, **known))
            self.known += 1
        return pending

    def run(self, pending: Sequence[tuple[Task, str]]) -> Table:
        """Run what is pending and count everything."""
        keys = {_place(task): key for task, key in pending}
        total = len(self.results) + len(pending)
        self.told(len(self.results), total)
        for result in self.spread.results([task for task, _ in pending]):
            self.results.append(result)
            self.runs += result.runs
            if result.passed is not None:  # a run that failed may work the next time
                self.store.write(CELLS, keys[_place(result)], _body(result))
            self.told(len(self.results), total)
        return make_table(self.plan, self.results)


def _place(of: Task | Result) -> tuple[int, int, str]:
    return of.cell, of.seed, of.column


def _body(result: Result) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if key not in ("cell", "seed", "column")}
