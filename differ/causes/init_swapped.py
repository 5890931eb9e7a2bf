"""`init.swapped`: initial tensors are in each other's place: two modules exchanged, or a cycle of several.

Formula: among the records of init that differ, a's digests are a permutation of b's.  Digests are of the bytes, so this
holds for frozen weights too, whose values are not in the file; the share is 1 because nothing differs once they are put
back.  Records of one shape and dtype only, and no two with the same bytes, which would leave the places open.

Source: loaders that map a checkpoint's names wrongly (gate and up projections, q and k, layers off by one).  Which side
has them in the right place, the numbers do not say.
"""

from __future__ import annotations

from typing import Final

from differ.align import Row
from differ.causes.context import Context
from differ.causes.records import suspects
from differ.causes.words import listed
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "init.swapped"


def find(context: Context) -> list[Cause]:
    """One cause for every closed set of places."""
    a, b = context.row("a", Phase.INIT, 0), context.row("b", Phase.INIT, 0)
    if a is None or b is None:
        return []
    places = [
        place for step, phase, found in context.groups(Phase.INIT) for place in suspects(context, step, phase, found)
    ]
    names = [place.name for place in places if place.name in a.positions and place.name in b.positions]
    here, there = _places(a, names), _places(b, names)
    moved = {name: there[digest] for digest, name in here.items() if digest in there}
    cycles = _cycles(moved)
    pairs: list[tuple[str, ...]] = [cycle for cycle in cycles if len(cycle) == 2]
    causes = [_pairs(pairs)] if pairs else []
    return causes + [_cycle(cycle) for cycle in cycles if len(cycle) > 2]


def _places(row: Row, names: list[str]) -> dict[tuple[bytes, str, tuple[int, ...]], str]:
    """What is where: digest, dtype and shape -> name, without those that are there twice."""
    found: dict[tuple[bytes, str, tuple[int, ...]], str] = {}
    twice = set()
    for name in names:
        digest = row.digest(name)
        key = (digest, row.entry(name).dtype, row.shape(name))
        if not digest or key in found:
            twice.add(key)
        found[key] = name
    return {key: name for key, name in found.items() if key not in twice}


def _cycles(moved: dict[str, str]) -> list[tuple[str, ...]]:
    """Closed cycles of a partial permutation `place in a -> place in b`; each begins with its first name."""
    cycles: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for start in sorted(moved):
        cycle = [start]
        seen_here = {start}
        while (following := moved.get(cycle[-1])) is not None and following not in seen_here:
            cycle.append(following)
            seen_here.add(following)
        if start not in seen and following == start and len(cycle) > 1:
            cycles.append(tuple(cycle))
            seen |= seen_here
    return cycles


def _pairs(pairs: list[tuple[str, ...]]) -> Cause:
    shown = listed((f"{pair[0]} and {pair[1]}" for pair in pairs), most=2)
    summary = f"in each other's place: {shown}"
    parameters = {"pairs": [list(pair) for pair in pairs]}
    return _cause(tuple(sorted(name for pair in pairs for name in pair)), summary, parameters)


def _cycle(cycle: tuple[str, ...]) -> Cause:
    summary = f"{len(cycle):,} tensors are in each other's place: a's {cycle[0]} is b's {cycle[1]}, and so on"
    return _cause(tuple(sorted(cycle)), summary, {"cycle": list(cycle)})


def _cause(
    names: tuple[str, ...], summary: str, parameters: dict[str, list[str]] | dict[str, list[list[str]]]
) -> Cause:
    return Cause(ID, summary, step=0, phase=Phase.INIT.label, names=names, parameters=parameters, explains=1.0)
