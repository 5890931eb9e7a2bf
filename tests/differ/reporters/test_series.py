"""What the reports draw: numbers that the traces hold, and that add up to what the verdict counts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from differ import DiffOptions, DiffResult, diff
from differ.series import Cell, Curve, Mark, Series
from tests.builders import make_trace
from tests.differ.reporters.conftest import Drawn
from tracer.reader import open_trace
from tracer.schema import Phase


def series_of(result: DiffResult) -> Series:
    assert result.series is not None
    return result.series


def curve(series: Series, name: str) -> Curve:
    return next(curve for curve in series.curves if curve.name == name)


def cells(series: Series, phase: str) -> list[Cell]:
    row = series.phases.rows.index(phase)
    return [cell for cell in series.phases.cells if cell.row == row]


def test_series_are_made_only_when_asked_for_and_change_nothing(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", fault="grad_element")

    plain, drawn = diff(a, b), diff(a, b, DiffOptions(series=True))

    assert plain.series is None
    assert replace(drawn, series=None) == plain


def test_the_default_json_has_no_series(drawn: Drawn) -> None:
    result = drawn("grad_element")

    assert "series" not in result.to_dict()
    assert set(result.to_dict(series=True)) == {*result.to_dict(), "series"}


@pytest.mark.parametrize(
    "fault", [None, "clip_value", "grad_element", "init_names", "batch_order", "grad_nan", "micro_batches"]
)
def test_cells_and_totals_add_up_to_the_counts(fault: str | None, drawn: Drawn) -> None:
    result = drawn(fault)
    series, counts = series_of(result), result.counts

    for name in ("same_bits", "within", "propagated", "diverged"):
        assert sum(getattr(cell, name) for cell in series.phases.cells) == getattr(counts, name), name
        assert sum(getattr(total, name) for total in series.totals) == getattr(counts, name), name


def test_the_curves_are_the_recorded_values(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", fault="loss_factor")
    series = series_of(diff(a, b, DiffOptions(series=True)))

    with open_trace(b) as trace:
        losses = [float(np.mean([_loss(trace, step, m) for m in (0, 1)])) for step in (1, 2, 3)]
        norms = [_norm(trace, step) for step in (1, 2, 3)]

    assert series.steps == (1, 2, 3)
    assert curve(series, "loss").lines[1].values == pytest.approx(losses, rel=1e-6)
    assert curve(series, "grad_norm").lines[1].values == pytest.approx(norms, rel=1e-6)


def _loss(trace: object, step: int, micro_batch: int) -> float:
    row = trace.row(Phase.LOSS, step, micro_batch)  # type: ignore[attr-defined]
    return float(row.read(row.layout.positions["loss"]))


def _norm(trace: object, step: int) -> float:
    row = trace.row(Phase.GRAD, step)  # type: ignore[attr-defined]
    return math.sqrt(sum(float((row.read(i).astype(float) ** 2).sum()) for i in range(row.layout.records)))


def test_a_doubled_loss_is_a_gap_of_one_half(drawn: Drawn) -> None:
    gap = next(line for line in curve(series_of(drawn("loss_factor")), "gap").lines if line.name == "loss")
    assert gap.values[0] == pytest.approx(0.5, rel=1e-5)


def test_a_planted_fault_marks_its_step_phase_and_layer(drawn: Drawn) -> None:
    series = series_of(drawn("grad_element"))

    marked = [(cell.column, cell.row) for cell in series.phases.cells if cell.mark is Mark.DIVERGED]
    assert [(series.columns[c], series.phases.rows[r]) for c, r in marked] == [((2, 2), "grad")]
    strip = next(strip for strip in series.layers if strip.name == "grad")
    marked = [(cell.column, cell.row) for cell in strip.cells if cell.mark is Mark.DIVERGED]
    assert [(series.columns[c], strip.rows[r]) for c, r in marked] == [((2, 2), "layer 1")]


def test_nothing_is_marked_between_runs_that_differ_by_rounding(drawn: Drawn) -> None:
    series = series_of(drawn(None))

    strips = (series.phases, *series.layers)
    assert {cell.mark for strip in strips for cell in strip.cells} <= {Mark.SAME, Mark.WITHIN}
    assert all(cell.margin is None or cell.margin < 1 for strip in strips for cell in strip.cells)


def test_a_layer_of_one_side_is_unrecorded_not_the_same(drawn: Drawn) -> None:
    strip = next(strip for strip in series_of(drawn("init_names")).layers if strip.name == "grad")
    assert {cell.mark for cell in strip.cells if strip.rows[cell.row] == "layer 0"} == {Mark.UNRECORDED}


def test_the_norm_of_a_gradient_that_is_not_finite_is_no_number(drawn: Drawn) -> None:
    norms = curve(series_of(drawn("grad_nan")), "grad_norm").lines[1].values
    assert [value is not None and math.isnan(value) for value in norms] == [False, True, True]


def test_records_are_worst_first_and_say_where_they_diverged(drawn: Drawn) -> None:
    result = drawn("grad_element")
    records = series_of(result).records

    assert (records[0].name, records[0].diverged_at) == (result.first and result.first.name, 2)
    assert [record.margin for record in records] == sorted((record.margin for record in records), reverse=True)
    assert result.worst is not None
    assert records[0].margin == result.worst.margin


def test_many_steps_share_columns_and_the_worst_is_kept(tmp_path: Path) -> None:
    settings = {"steps": 300, "layers": (0,), "depth": 1, "micro_batches": 1}
    a = make_trace(tmp_path / "a.h5", **settings)
    b = make_trace(tmp_path / "b.h5", fault="eval", at=250, **settings)
    series = series_of(diff(a, b, DiffOptions(series=True)))

    assert len(series.steps) == 300
    assert len(series.columns) <= 240
    assert series.columns[0] == (0, 0)
    assert [last for _, last in series.columns[1:-1]] == [first - 1 for first, _ in series.columns[2:]]
    bad = [series.columns[cell.column] for cell in cells(series, "eval") if cell.mark is Mark.DIVERGED]
    assert len(bad) == 1
    assert bad[0][0] <= 250 <= bad[0][1]


def test_phases_and_names_that_are_left_out_are_not_drawn(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", noise=3e-7)
    options = DiffOptions(series=True, phases=frozenset({Phase.GRAD}), only=("*layers.1.*",))
    series = series_of(diff(a, b, options))

    assert series.phases.rows == ("grad",)
    assert [(strip.name, strip.rows) for strip in series.layers] == [("grad", ("layer 1",))]
    assert all(".layers.1." in record.name for record in series.records)


def test_a_probe_of_the_caller_is_still_called(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", noise=3e-7)
    seen: list[object] = []
    diff(a, b, DiffOptions(series=True, probe=seen.append))
    assert seen


def test_the_gap_of_a_layer_is_that_of_its_norms(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", fault="clip_value")
    series = series_of(diff(a, b, DiffOptions(series=True)))
    strip = next(strip for strip in series.layers if strip.name == "clipped_grad")
    cell = next(cell for cell in strip.cells if cell.row == 1 and series.columns[cell.column] == (2, 2))

    norms = []
    for path in (a, b):
        with open_trace(path) as trace:
            row = trace.row(Phase.CLIPPED_GRAD, 2)
            assert row is not None
            inside = [i for i, entry in enumerate(row.layout.entries) if ".layers.1." in entry.name]
            norms.append(math.sqrt(sum(float((row.read(i).astype(float) ** 2).sum()) for i in inside)))

    assert cell.gap == pytest.approx(abs(norms[0] - norms[1]) / max(norms), rel=1e-6)
    assert cell.gap > 0.8
