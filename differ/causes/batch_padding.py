"""`batch.padding`: the same rows, padded to another width, with another id, or on the other side.

Formula: without their padding (what the attention mask leaves out; without a mask, the run of equal, unsupervised ids at
the end or the beginning) the rows of a micro-batch hold the same ids and labels on both sides, in order.  Share: of the
rows that differ, those that agree once trimmed.

Source: `create_text_batches` padding one token wider, collators that pad to a multiple, left against right padding.
Supervised padding is not padding: it counts as another mask (`batch.mask`).
"""

from __future__ import annotations

from typing import Any, Final

from differ.causes.batches import INPUT_IDS, LABELS, MASK, POSITIONS, Batch, Line, batch_steps, first_ids, lines, pairs
from differ.causes.context import Context
from differ.causes.fit import SHOWN, explained_share
from differ.causes.words import count
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "batch.padding"


def find(context: Context) -> list[Cause]:
    """One cause for every step at which the padding begins to differ."""
    causes = []
    for step, found in batch_steps(context):
        names = {f.name for f in found}
        if INPUT_IDS in names:
            causes += _at(context, step, names)
    return causes


def _at(context: Context, step: int, found: set[str | None]) -> list[Cause]:
    differ = left = 0
    words: dict[str, dict[str, Any]] = {"a": {}, "b": {}}
    for _, a, b in pairs(context, step):
        if a.ids.shape == b.ids.shape and (a.ids == b.ids).all():
            continue
        if len(a.ids) != len(b.ids):
            return []
        both = _trimmed(a, b)
        differ += len(both)
        left += sum((x.ids, x.labels) != (y.ids, y.labels) for x, y in both)
        for side, here, trimmed in (("a", a, [x for x, _ in both]), ("b", b, [y for _, y in both])):
            _describe(words[side], here, trimmed)
    share = explained_share(differ, left)
    if share < SHOWN or not (words["a"].get("padded") or words["b"].get("padded")):
        return []
    names = sorted({INPUT_IDS, LABELS, MASK, POSITIONS} & {name for name in found if name is not None})
    parameters = {f"{key}_{side}": words[side].get(key) for side in "ab" for key in ("width", "where", "id")}
    summary = _sentence(words["a"], words["b"])
    return [Cause(ID, summary, None, step, Phase.BATCH.label, tuple(names), parameters, share)]


def _trimmed(a: Batch, b: Batch) -> list[tuple[Line, Line]]:
    """Rows of both sides without padding.  Ids at the beginning are padding on one side at most: try which."""
    nothing: frozenset[int] = frozenset()
    tries = ((nothing, nothing), (first_ids(b), nothing), (nothing, first_ids(a)))
    pairs = [list(zip(lines(a, left_a), lines(b, left_b), strict=True)) for left_a, left_b in tries]
    return min(pairs, key=lambda rows: sum((x.ids, x.labels) != (y.ids, y.labels) for x, y in rows))


def _describe(words: dict[str, Any], here: Batch, trimmed: list[Line]) -> None:
    """Width of the first micro-batch that differs, on which side it is padded and with what."""
    words.setdefault("width", int(here.ids.shape[1]))
    for line in trimmed:
        if line.pad is not None:
            words.setdefault("id", line.pad)
            words.setdefault("where", "left" if line.left else "right")
            words["padded"] = True


def _sentence(a: dict[str, Any], b: dict[str, Any]) -> str:
    parts = []
    if a["width"] != b["width"]:
        parts.append(f"a's rows are {count(a['width'], 'token')} wide, b's {b['width']:,}")
    if a.get("where") and b.get("where") and a["where"] != b["where"]:
        parts.append(f"a pads on the {a['where']}, b on the {b['where']}")
    if a.get("id") is not None and b.get("id") is not None and a["id"] != b["id"]:
        parts.append(f"a pads with id {a['id']}, b with {b['id']}")
    what = ", and ".join(parts) if parts else "a and b pad differently"
    return f"{what}; without padding the rows agree"
