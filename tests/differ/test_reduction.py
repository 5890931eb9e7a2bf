"""Losses under another reduction are the same losses; a changed loss is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import Verdict, diff
from tests.builders import make_trace
from tracer.schema import Phase, Row


def losses(change: Callable[[float, int], float]) -> Callable[[Row], Row]:
    """An edit of a trace: every loss becomes `change(loss, micro_batch)`."""

    def edit(row: Row) -> Row:
        if row.phase is not Phase.LOSS:
            return row
        records = tuple(
            replace(record, data=np.asarray(change(float(record.data), row.micro_batch), np.float32))
            if record.name == "loss" and record.data is not None
            else record
            for record in row.records
        )
        return replace(row, records=records)

    return edit


@pytest.mark.parametrize("count", [2, 3])
def test_a_loss_divided_by_the_micro_batches_is_the_same_and_noted(tmp_path: Path, count: int) -> None:
    a = make_trace(tmp_path / "a.h5", micro_batches=count)
    b = make_trace(tmp_path / "b.h5", micro_batches=count, edit=losses(lambda loss, _: loss / count))
    for result, divides in (
        (diff(a, b), "b each micro-batch's mean"),
        (diff(b, a), "a differentiates each micro-batch's mean"),
    ):
        assert result.verdict is Verdict.SAME
        (note,) = [note for note in result.notes if note.id == "loss.weighted"]
        assert f"{divides} loss divided by their number" in note.summary
        assert result.systematic == ()


@pytest.mark.parametrize(
    "change",
    [lambda loss, _: loss / 4, lambda loss, m: loss / 2 if m == 0 else loss, lambda *_: np.nan],
    ids=["another factor", "one of them", "nan"],
)
def test_any_other_change_of_a_loss_is_found(tmp_path: Path, change: Any) -> None:
    a = make_trace(tmp_path / "a.h5", micro_batches=2)
    b = make_trace(tmp_path / "b.h5", micro_batches=2, edit=losses(change))
    result = diff(a, b)
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (1, "loss")


def test_one_micro_batch_has_one_reduction(tmp_path: Path) -> None:
    a = make_trace(tmp_path / "a.h5", micro_batches=1)
    b = make_trace(tmp_path / "b.h5", micro_batches=1, edit=losses(lambda loss, _: loss / 2))
    result = diff(a, b)
    assert result.first is not None
    assert result.first.phase == "loss"


def test_token_counts_of_one_side_tell_the_reduction_of_both(tmp_path: Path) -> None:
    without = frozenset(Phase) - {Phase.BATCH}
    uneven = {"rows": 2, "micro_batches": 2}
    counts = (10, 8)

    def fewer(row: Row) -> Row:
        if row.phase is not Phase.BATCH:
            return row
        tokens = np.int64(counts[row.micro_batch])
        return replace(row, records=tuple(replace(r, data=tokens) if r.name == "tokens" else r for r in row.records))

    a = make_trace(tmp_path / "a.h5", edit=fewer, **uneven)
    b = make_trace(
        tmp_path / "b.h5", edit=losses(lambda loss, m: loss * counts[m] / sum(counts)), what=without, **uneven
    )
    for result in (diff(a, b), diff(b, a)):
        assert result.verdict is Verdict.SAME
        assert [note.id for note in result.notes if note.id == "loss.weighted"]
