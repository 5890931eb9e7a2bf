"""Ranks that hold different values: a finding where one side does, nothing that hides a divergence where both do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from differ import Verdict, diff
from tests.tracer.ranks import WORLD, Edit, change, run, tensor, whole
from tracer.schema import WHOLE_STEP, Phase, Record, Row


def times(factor: float) -> Edit:
    """Rank 1's parameters at step 1 multiplied."""

    def scale(record: Record) -> Record:
        assert record.data is not None
        return replace(record, data=record.data * np.float32(factor))

    return change(Phase.PARAM, 1, 1, scale)


def drifted(path: Path, at: int = 0) -> Path:
    """A run that drifts at step 1, and whose gradients are others on all ranks at step `at`."""

    def edit(row: Row, rank: int) -> Row:
        row = times(2.0)(row, rank)
        for each in range(WORLD if at else 0):
            row = change(Phase.GRAD, at, each, lambda r: replace(r, data=None if r.data is None else r.data + 1))(
                row, rank
            )
        return row

    return run(path, edit)


@pytest.mark.parametrize("step", [1, 2])
def test_drift_of_both_sides_hides_no_divergence(tmp_path: Path, step: int) -> None:
    a = drifted(tmp_path / "a.h5")
    assert diff(a, drifted(tmp_path / "same.h5")).verdict is Verdict.SAME

    result = diff(a, drifted(tmp_path / "b.h5", at=step))

    assert result.first is not None
    assert (result.first.step, result.first.phase) == (step, "grad")


def clipped(path: Path, *factors: float) -> Path:
    """A run whose ranks multiply the same gradient by factors of their own."""

    def extra(step: int, rank: int) -> list[Row]:
        record = tensor(
            Phase.CLIPPED_GRAD, step, "w", (factors[rank] * whole(step, "w", Phase.GRAD)).astype(np.float32)
        )
        return [Row(Phase.CLIPPED_GRAD, step, WHOLE_STEP, (record,))]

    return run(path, extra=extra)


def test_ranks_that_clip_by_norms_of_their_own_are_a_cause_with_their_factors(tmp_path: Path) -> None:
    a = clipped(tmp_path / "a.h5", 0.5, 0.5)
    assert diff(a, clipped(tmp_path / "same.h5", 0.5, 0.5)).verdict is Verdict.SAME

    result = diff(a, clipped(tmp_path / "b.h5", 0.5, 0.25))

    (cause,) = [cause for cause in result.causes if cause.id == "clip.norm"]
    assert cause.parameters is not None
    assert cause.parameters["factors"] == pytest.approx([0.5, 0.25])
    assert cause.explains == pytest.approx(1.0)
