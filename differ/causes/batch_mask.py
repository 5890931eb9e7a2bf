"""`batch.mask`: the same ids, but other positions are supervised, or attended to.

Formula: input_ids agree; where both sides supervise a position, the labels agree; some positions are supervised on one
side only (labels -100 on the other).  Share: of the labels that differ, those that a difference of the mask accounts
for.  The same for attention_mask, of which only zero or not counts.  `tokens` is part of it if it is the number of
supervised positions on both sides.

Source: masks off by one (verl #3287), prompts masked or not, lengths [1, L - 1] against [0, L], masks emptied by
truncation (mlx-lm #1355).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from differ.causes.batches import IGNORED, LABELS, MASK, TOKENS, batch_steps, counts_follow, pairs
from differ.causes.context import Context
from differ.causes.fit import SHOWN, explained_share
from differ.causes.words import count
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "batch.mask"

# Positions that are listed as [micro-batch, row, column].
MOST_LISTED: Final = 8

Bools = npt.NDArray[np.bool_]


def find(context: Context) -> list[Cause]:
    """One cause for every step at which a mask begins to differ."""
    causes = []
    for step, found in batch_steps(context):
        names = {f.name for f in found}
        for name in (LABELS, MASK):
            if name in names:
                causes += _at(context, step, name, names)
    return causes


def _at(context: Context, step: int, name: str, found: set[str | None]) -> list[Cause]:
    only_a: list[list[int]] = []
    only_b: list[list[int]] = []
    differ = left = 0
    edges: set[str] = set()
    for micro_batch, a, b in pairs(context, step):
        x, y = (a.labels, b.labels) if name == LABELS else (a.mask, b.mask)
        if x is None or y is None or a.ids.shape != b.ids.shape or (a.ids != b.ids).any():
            return []
        on_a, on_b = (x != IGNORED, y != IGNORED) if name == LABELS else (x != 0, y != 0)
        differ += int((x != y).sum())
        left += int((on_a & on_b & (x != y)).sum()) if name == LABELS else 0
        only_a += [[micro_batch, *map(int, at)] for at in np.argwhere(on_a & ~on_b)]
        only_b += [[micro_batch, *map(int, at)] for at in np.argwhere(on_b & ~on_a)]
        edges |= _edges(on_a, on_b)
    share = explained_share(differ, left)
    if share < SHOWN:
        return []
    edge = edges.pop() if len(edges) == 1 else None
    parameters: dict[str, Any] = {"only_a": len(only_a), "only_b": len(only_b), "where": edge}
    parameters |= {"positions": sorted(only_a + only_b)[:MOST_LISTED], "record": name}
    names = {name} | ({TOKENS} if name == LABELS and TOKENS in found and counts_follow(context, step) else set())
    summary = _sentence("supervised" if name == LABELS else "attended to", len(only_a), len(only_b), edge)
    return [Cause(ID, summary, None, step, Phase.BATCH.label, tuple(sorted(names)), parameters, share)]


def _edges(on_a: Bools, on_b: Bools) -> set[str]:
    """Where the positions of one side only are among those of either side: first, last of their row, or elsewhere."""
    found = set()
    for x, y in zip(on_a, on_b, strict=True):
        apart, either = np.flatnonzero(x != y), np.flatnonzero(x | y)
        if apart.size:
            at_start = np.array_equal(apart, either[: apart.size])
            at_end = np.array_equal(apart, either[-apart.size :])
            found.add("all" if at_start and at_end else "first" if at_start else "last" if at_end else "elsewhere")
    return found


def _sentence(what: str, only_a: int, only_b: int, edge: str | None) -> str:
    where = f" (the {edge} of their rows)" if edge in ("first", "last") else ""
    if only_a and only_b:
        return f"same ids, {count(only_a, 'position')} {what} in a only and {only_b:,} in b only{where}"
    side = "a" if only_a else "b"
    return f"same ids, {count(only_a or only_b, 'position')} {what} in {side} only{where}"
