"""`batch.order`: the same rows in another order: within a micro-batch, within a step, or over the steps recorded.

Formula: the rows, ids and labels without padding, are counted on both sides; the smallest scope in which both count the
same is named.  Share: of the rows that are not at the same place, those that the other side has too.  Rows that are split
into another number of micro-batches count as one step.

Source: a shuffle with another seed, or a seed that was reset at another moment or ignored (mlx-lm #1660), accumulation of
2 x 3 rows against one batch of 6.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

from differ.causes.batches import INPUT_IDS, LABELS, MASK, POSITIONS, TOKENS, batch, batch_steps, counts_follow, lines
from differ.causes.context import Context
from differ.causes.fit import SHOWN, explained_share
from differ.causes.words import count
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "batch.order"

_SCOPES: Final = {"micro_batch": "within each micro-batch", "step": "within the step", "run": "over the steps recorded"}

# Digest of a row, in order.
Keys = list[bytes]


def find(context: Context) -> list[Cause]:
    """One cause, at the first step whose batches differ."""
    for step, found in batch_steps(context):
        names = {f.name for f in found}
        if names & {INPUT_IDS, None}:
            return _at(context, step, names)
    return []


def _at(context: Context, step: int, found: set[str | None]) -> list[Cause]:
    a, b = (_rows(context, side, step) for side in "ab")
    if a is None or b is None or not a or not b:
        return []
    scope, share, rows = _scope(context, step, a, b)
    if share < SHOWN:
        return []
    names = {INPUT_IDS, LABELS, MASK, POSITIONS} & {name for name in found if name is not None}
    if TOKENS in found and counts_follow(context, step):
        names.add(TOKENS)
    parameters: dict[str, Any] = {"scope": scope, "rows": rows}
    summary = f"the same {count(rows, 'row')} in another order, {_SCOPES[scope]}"
    if len(a) != len(b):
        parameters |= {"micro_batches_a": len(a), "micro_batches_b": len(b)}
        summary = (
            f"the same {count(rows, 'row')} in {count(len(a), 'micro-batch', 'micro-batches')} in a, {len(b):,} in b"
        )
    return [Cause(ID, summary, None, step, Phase.BATCH.label, tuple(sorted(names)), parameters, share)]


def _scope(context: Context, step: int, a: dict[int, Keys], b: dict[int, Keys]) -> tuple[str, float, int]:
    """The smallest scope in which the rows are the same, its share and number of rows."""
    flat_a, flat_b = ([key for keys in side.values() for key in keys] for side in (a, b))
    if a.keys() == b.keys():
        shares = [_share(a[m], b[m]) for m in a if a[m] != b[m]]
        if shares and min(shares) >= SHOWN:
            return "micro_batch", min(shares), sum(len(a[m]) for m in a if a[m] != b[m])
    share = _share(flat_a, flat_b, len(a) != len(b))
    if share >= SHOWN:
        return "step", share, len(flat_a)
    later = [s for s in context.steps() if s >= step]
    every = [[key for s in later for keys in (_rows(context, side, s) or {}).values() for key in keys] for side in "ab"]
    return "run", _share(every[0], every[1]), len(every[0])


def _share(a: Keys, b: Keys, resplit: bool = False) -> float:
    """Of the rows that are not at the same place, the share that both sides have; 0 where every row is in its place."""
    misplaced = (
        max(len(a), len(b)) if resplit else sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    )
    only = max((Counter(a) - Counter(b)).total(), (Counter(b) - Counter(a)).total())
    return explained_share(misplaced, only)


def _rows(context: Context, side: str, step: int) -> dict[int, Keys] | None:
    """Digests of the rows of each micro-batch of a step; None if a micro-batch has no ids."""
    found: dict[int, Keys] = {}
    for micro_batch in context.trace(side).micro_batches(Phase.BATCH, step):
        here = batch(context, side, step, micro_batch)
        if here is None:
            return None
        found[micro_batch] = [_digest((*line.ids, -1, *line.labels)) for line in lines(here)]
    return found


def _digest(numbers: Iterable[int]) -> bytes:
    return hashlib.blake2b(",".join(map(str, numbers)).encode(), digest_size=16).digest()
