"""An entry with other seeds: the same pair of runs, other adapters, batches and rows.

Each shift is added to the seeds of every arm, so what two arms have in common they keep in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from scenarios.catalogue.entry import ArmSpec, Entry, identity
from scenarios.catalogue.running import Outcome, Report, Status

# Settings that are seeds; a program may have an option `seed` beside them.
SEEDS: Final = ("train.seed", "data.seed")
_MARK: Final = ".seed+"


def with_seeds(entries: Sequence[Entry], count: int) -> tuple[Entry, ...]:
    """Every entry with its own seeds, and with those shifted by 1 to count - 1."""
    return tuple(shifted(entry, by) for entry in entries for by in range(count))


def shifted(entry: Entry, by: int) -> Entry:
    """The entry with its seeds shifted, and an id that says so."""
    arms = {name: _shifted(arm, identity(entry.arms, name)["settings"], by) for name, arm in entry.arms.items()}
    return replace(entry, id=f"{entry.id}{_MARK}{by}", arms=arms)


def _shifted(arm: ArmSpec, effective: Mapping[str, object], by: int) -> ArmSpec:
    seeds = {key: value + by for key in SEEDS if isinstance(value := effective[key], int)}
    options = {**arm.options, **{key: value + by for key, value in arm.options.items() if key == "seed"}}
    return replace(arm, settings={**arm.settings, **seeds}, options=options)


def table(report: Report) -> str:
    """One line an entry, with how many of its seeds ended as expected, and below it those that did not."""
    by_entry: dict[str, list[tuple[str, Outcome]]] = defaultdict(list)
    for outcome in report.outcomes:
        name, _, by = outcome.entry.id.rpartition(_MARK)
        by_entry[name].append((by, outcome))
    width = max(len(name) for name in by_entry)
    lines = []
    for name, outcomes in by_entry.items():
        right = sum(outcome.status is Status.EXPECTED for _, outcome in outcomes)
        lines.append(f"{name:<{width}}  {right} of {len(outcomes)} seeds as expected")
        lines += [
            f"  seeds + {by}: {_why(outcome)}" for by, outcome in outcomes if outcome.status is not Status.EXPECTED
        ]
    return "\n".join([*lines, f"{report.recorded} runs recorded, {report.seconds:.0f} s"]) + "\n"


def _why(outcome: Outcome) -> str:
    wrong = (f"{' and '.join(one.arms)}: {sentence}" for one in outcome.compared for sentence in one.wrong)
    return outcome.reason or next(wrong, outcome.status.value)
