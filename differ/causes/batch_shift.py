"""`batch.shift`: ids or labels shifted along the row; by one, with the first id twice: a doubled BOS.

Formula: b[:, k:] = a[:, :L - k] for one k, -8 <= k <= 8, the smallest that fits, in every micro-batch of the step that
differs; rows may be of unequal length.  Share: of the positions that differ, those that agree once shifted back; the |k|
positions at the ends, which have no counterpart, are left out.

Source: a chat template that renders BOS before a tokenizer that adds one (mlx-examples #1095, unsloth #2648, trl #1114),
labels that are shifted twice or not at all.
"""

from __future__ import annotations

from typing import Final

from differ.causes.batches import INPUT_IDS, LABELS, MASK, POSITIONS, TOKENS, Ints, batch, batch_steps, counts_follow
from differ.causes.context import Context
from differ.causes.fit import SHOWN, Sums
from differ.causes.words import count
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "batch.shift"

FURTHEST: Final = 8
# A shift has to be seen on so many positions that differ.
FEWEST: Final = 2


def find(context: Context) -> list[Cause]:
    """One cause for every step at which a shift begins."""
    causes = []
    for step, found in batch_steps(context):
        names = {f.name for f in found}
        for name in (INPUT_IDS, LABELS):
            fitted = _fit(context, step, name) if name in names else None
            if fitted is not None:
                causes.append(_cause(context, step, name, fitted[0], fitted[1], names))
                break
    return causes


def _fit(context: Context, step: int, name: str) -> tuple[int, Sums] | None:
    """The smallest shift that explains a record in all micro-batches of a step."""
    sides = _sides(context, step, name)
    for k in sorted(range(-FURTHEST, FURTHEST + 1), key=lambda k: (abs(k), -k)):
        sums = Sums()
        for a, b in sides:
            _count(sums, a, b, k)
        if k and sums.difference >= FEWEST and sums.share >= SHOWN:
            return k, sums
    return None


def _sides(context: Context, step: int, name: str) -> list[tuple[Ints, Ints]]:
    """A record of both sides in the micro-batches in which it differs."""
    found = []
    for micro_batch in context.micro_batches(Phase.BATCH, step):
        both = [batch(context, side, step, micro_batch) for side in "ab"]
        a, b = (None if side is None else side.ids if name == INPUT_IDS else side.labels for side in both)
        if a is not None and b is not None and len(a) == len(b) and (a.shape != b.shape or (a != b).any()):
            found.append((a, b))
    return found


def _count(sums: Sums, a: Ints, b: Ints, k: int) -> None:
    """Unequal positions before and after shifting b back by k, over the positions that have a counterpart."""
    width = min(a.shape[1], b.shape[1] - k) if k > 0 else min(a.shape[1] + k, b.shape[1])
    if width <= 0:
        sums.residual += 1.0
        return
    mine = a[:, :width] if k > 0 else a[:, -k : -k + width]
    theirs = b[:, k : k + width] if k > 0 else b[:, :width]
    start = max(k, 0)
    common = min(a.shape[1], b.shape[1])
    before = a[:, start:common] != b[:, start:common]
    sums.difference += float(before.sum())
    sums.residual += float((mine != theirs).sum())


def _cause(context: Context, step: int, name: str, k: int, sums: Sums, found: set[str | None]) -> Cause:
    names = {name}
    if name == INPUT_IDS and LABELS in found and (labels := _fit(context, step, LABELS)) is not None and labels[0] == k:
        names.add(LABELS)
    if name == INPUT_IDS:
        names |= {MASK, POSITIONS} & {n for n in found if n is not None}
    if TOKENS in found and LABELS in names | (set() if LABELS in found else {LABELS}) and counts_follow(context, step):
        names.add(TOKENS)
    side = "b" if k > 0 else "a"
    doubled = name == INPUT_IDS and abs(k) == 1 and _doubled(context, step, side)
    what = "ids" if name == INPUT_IDS else "labels"
    if doubled:
        summary = f"{side}'s rows begin with the same id twice (a doubled BOS): its {what} are shifted right by 1"
    else:
        # Which side is wrong the numbers do not tell: b is held against a.
        summary = f"b's {what} are shifted {'right' if k > 0 else 'left'} by {count(abs(k), 'position')}"
    parameters = {"shift": k, "doubled_bos": doubled}
    return Cause(
        ID, summary, side if doubled else None, step, Phase.BATCH.label, tuple(sorted(names)), parameters, sums.share
    )


def _doubled(context: Context, step: int, side: str) -> bool:
    """Whether rows of that side begin with one id twice, and the other side's with that id once."""
    seen = False
    for micro_batch in context.micro_batches(Phase.BATCH, step):
        mine, other = (
            batch(context, side, step, micro_batch),
            batch(context, "a" if side == "b" else "b", step, micro_batch),
        )
        if mine is None or other is None or mine.ids.shape[1] < 2 or other.ids.shape[1] < 2:
            return False
        if not ((mine.ids[:, 0] == mine.ids[:, 1]) & (mine.ids[:, 0] == other.ids[:, 0])).all():
            return False
        seen = True
    return seen
