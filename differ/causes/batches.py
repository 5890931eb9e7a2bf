"""Batches of both sides as the batch causes look at them: one micro-batch at a time, its rows, what is padding.

    ids      input_ids [B, L]
    labels   labels [B, L], -100 where nothing is supervised; None if the run recorded none
    mask     attention_mask [B, L], 0 on padding; None if the run recorded none

Padding of a row is what its attention mask says; without one, the run of equal, unsupervised ids at its end (and at its
beginning, if the other side's row does not begin with that id).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from differ.causes.context import Context
from differ.result import Finding
from tracer.schema import WHOLE_STEP, Phase

INPUT_IDS: Final = "input_ids"
LABELS: Final = "labels"
MASK: Final = "attention_mask"
TOKENS: Final = "tokens"
POSITIONS: Final = "position_ids"
IGNORED: Final = -100

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one side."""

    ids: Ints
    labels: Ints | None
    mask: Ints | None

    @property
    def supervised(self) -> int | None:
        """Number of supervised positions; None without labels."""
        return None if self.labels is None else int((self.labels != IGNORED).sum())


@dataclass(frozen=True, slots=True)
class Line:
    """One row without its padding, with how much was cut off at either end and the id that padded it, if any."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    left: int
    right: int
    pad: int | None


def batch(context: Context, side: str, step: int, micro_batch: int) -> Batch | None:
    """One micro-batch of a side, None if it has no ids [B, L]."""
    ids, labels, mask = (_matrix(context, side, step, micro_batch, name) for name in (INPUT_IDS, LABELS, MASK))
    if ids is None:
        return None
    return Batch(ids, _like(labels, ids), _like(mask, ids))


def _like(values: Ints | None, ids: Ints) -> Ints | None:
    return values if values is not None and values.shape == ids.shape else None


def _matrix(context: Context, side: str, step: int, micro_batch: int, name: str) -> Ints | None:
    values = context.values(side, Phase.BATCH, step, name, micro_batch)
    return None if values is None or values.ndim != 2 else values.astype(np.int64)


def pairs(context: Context, step: int) -> Iterator[tuple[int, Batch, Batch]]:
    """Micro-batches of a step that both sides have."""
    for micro_batch in context.micro_batches(Phase.BATCH, step):
        a, b = (batch(context, side, step, micro_batch) for side in "ab")
        if a is not None and b is not None:
            yield micro_batch, a, b


def lines(batch: Batch, other_first: frozenset[int] = frozenset()) -> list[Line]:
    """The rows of a micro-batch without padding.

    Without an attention mask the beginning of a row is looked at only if `other_first`, the ids that rows of the other side
    begin with, are given.
    """
    return [_line(batch, i, other_first) for i in range(len(batch.ids))]


def _line(batch: Batch, i: int, other_first: frozenset[int]) -> Line:
    ids = batch.ids[i]
    labels = ids if batch.labels is None else batch.labels[i]
    padded = batch.mask is not None and bool((batch.mask[i] == 0).any())
    if padded and batch.mask is not None:
        kept = np.flatnonzero(batch.mask[i])
        start, stop = (int(kept[0]), int(kept[-1]) + 1) if kept.size else (0, 0)
    elif batch.mask is not None:
        start, stop = 0, ids.size
    else:
        start, stop = _unpadded(ids, None if batch.labels is None else labels, other_first)
    pad = int(ids[0]) if start > 0 else int(ids[-1]) if stop < ids.size else None
    kept_labels = tuple(labels[start:stop].tolist()) if batch.labels is not None else ()
    return Line(tuple(ids[start:stop].tolist()), kept_labels, start, ids.size - stop, pad)


def _unpadded(ids: Ints, labels: Ints | None, other_first: frozenset[int]) -> tuple[int, int]:
    """First position and end of what is not padding, by the ids and labels alone."""
    if ids.size == 0:
        return 0, 0
    idle = np.ones(ids.size, bool) if labels is None else labels == IGNORED
    real = np.flatnonzero((ids != ids[-1]) | ~idle)
    stop = int(real[-1]) + 1 if real.size else 0
    if not other_first or int(ids[0]) in other_first:
        return 0, stop
    real = np.flatnonzero((ids[:stop] != ids[0]) | ~idle[:stop])
    return (int(real[0]) if real.size else 0), stop


def first_ids(batch: Batch) -> frozenset[int]:
    """Ids that the rows of a micro-batch begin with."""
    return frozenset(batch.ids[:, 0].tolist()) if batch.ids.size else frozenset()


def found_names(context: Context, step: int) -> set[str]:
    """Names of the batch records with a finding at a step."""
    return {f.name for f in context.findings_in(Phase.BATCH) if f.step == step and f.name is not None}


def batch_steps(context: Context) -> list[tuple[int, tuple[Finding, ...]]]:
    """Steps with findings in their batches."""
    return [(step, found) for step, _, found in context.groups(Phase.BATCH)]


def counts_follow(context: Context, step: int) -> bool:
    """Whether each side's `tokens` is the number of supervised labels, so that it says nothing that they do not."""
    for micro_batch in context.micro_batches(Phase.BATCH, step):
        for side in "ab":
            tokens = context.scalar(side, Phase.BATCH, step, TOKENS, micro_batch)
            here = batch(context, side, step, micro_batch)
            if tokens is not None and here is not None and here.supervised is not None and tokens != here.supervised:
                return False
    return True


def whole_row(found: tuple[Finding, ...]) -> bool:
    """Whether one of the findings is about a whole micro-batch."""
    return any(f.name is None and f.micro_batch not in (None, WHOLE_STEP) for f in found)
