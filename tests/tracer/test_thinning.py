"""Long runs: which steps keep tensors, what is left of the others, and that a limit is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from differ.engine import diff
from tests.tracer.rows import gradients, loss, references
from tracer.cli.check import check_trace
from tracer.errors import RecordingStopped
from tracer.reader import Trace, open_trace
from tracer.schema import WHOLE_STEP, Phase, Record, Row, State
from tracer.size import estimate, human_bytes, parse_bytes
from tracer.thinning import LongRun, Thinner, thin
from tracer.writer import TraceWriter

INIT = Row(Phase.INIT, 0, WHOLE_STEP, (Record("p0", np.ones((8, 16), np.float32), "float32", (8, 16)),))


def one_loss(step: int, value: float) -> Row:
    return Row(Phase.LOSS, step, 0, (Record("loss", np.array(value, np.float32), "float32", ()),))


def write(path: Path, plan: LongRun, losses: list[float], shape: tuple[int, ...] = (8, 16), **faults: Row) -> Path:
    """A run whose steps have these losses; `at3=row` replaces the gradients of step 3."""
    writer = TraceWriter(path, env={}, declared={}, overwrite=True, max_bytes=plan.max_bytes)
    thinner = Thinner(writer, plan)
    reason = ""
    try:
        thinner.write_step(0, [INIT], None)
        for step, value in enumerate(losses, 1):
            grad = faults.get(f"at{step}", gradients(step, shape=shape))
            thinner.write_step(step, [one_loss(step, value), grad, references(step, shape=shape)], {})
    except RecordingStopped as error:
        reason = str(error)
    writer.finish(finished=not reason, reason=reason)
    return path


def full(trace: Trace) -> list[int]:
    """The steps whose gradients are there as tensors."""
    rows = [trace.row(Phase.GRAD, step) for step in trace.steps if step]
    return [row.step for row in rows if row is not None and row.stored(0)]


def test_the_first_steps_keep_their_tensors_and_the_others_a_fingerprint(tmp_path: Path) -> None:
    with open_trace(write(tmp_path / "a.h5", LongRun(full_steps=2), [1.0] * 5)) as trace:
        assert trace.steps == (0, 1, 2, 3, 4, 5)
        assert full(trace) == [1, 2]
        row = trace.row(Phase.GRAD, 4)
        assert row is not None
        assert row.sketched(1)
        clipped = trace.row(Phase.CLIPPED_GRAD, 4)
        assert clipped is not None
        assert clipped.sketched(1)
        assert trace.row(Phase.LOSS, 4, 0).read(0) == 1.0  # type: ignore[union-attr]
        assert check_trace(trace).problems == ()


def test_a_thinned_step_equals_the_same_step_in_full_to_the_bit(tmp_path: Path) -> None:
    write(tmp_path / "full.h5", LongRun(), [1.0] * 4)
    write(tmp_path / "thin.h5", LongRun(full_steps=1), [1.0] * 4)
    same = diff(tmp_path / "full.h5", tmp_path / "thin.h5")
    assert same.verdict == "same"
    assert same.counts.same_bits == same.counts.compared


def test_a_difference_in_a_thinned_step_is_found(tmp_path: Path) -> None:
    other = gradients(3)
    changed = Row(Phase.GRAD, 3, WHOLE_STEP, (*other.records[:2], scaled(other.records[2], 3.0), other.records[3]))
    write(tmp_path / "a.h5", LongRun(full_steps=1), [1.0] * 4)
    write(tmp_path / "b.h5", LongRun(full_steps=1), [1.0] * 4, at3=changed)
    result = diff(tmp_path / "a.h5", tmp_path / "b.h5")
    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.name) == (3, "grad", "p2")


def scaled(record: Record, factor: float) -> Record:
    assert record.data is not None
    data = np.asarray(record.data * np.float32(factor), np.float32)
    return Record(record.name, data, record.dtype, record.shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 9.0])
def test_steps_around_an_odd_loss_keep_their_tensors(tmp_path: Path, bad: float) -> None:
    losses = [2.0] * 12 + [bad] + [2.0] * 5
    with open_trace(write(tmp_path / "a.h5", LongRun(full_steps=1, around=2), losses)) as trace:
        assert full(trace) == [1, 11, 12, 13, 14, 15]
        assert check_trace(trace).problems == ()


@pytest.mark.parametrize("bad", [float("nan"), 9.0])
def test_an_anomaly_that_lasts_keeps_the_tensors_around_its_beginning_only(tmp_path: Path, bad: float) -> None:
    losses = [2.0] * 12 + [bad] * 20 + [2.0] + [bad]
    with open_trace(write(tmp_path / "a.h5", LongRun(full_steps=1, around=2), losses)) as trace:
        assert full(trace) == [1, 11, 12, 13, 14, 15, 32, 33, 34]
        assert check_trace(trace).problems == ()


def test_a_loss_that_falls_or_wavers_is_no_anomaly(tmp_path: Path) -> None:
    losses = [10.0 / step + 0.5 * (step % 3) for step in range(1, 25)]
    with open_trace(write(tmp_path / "a.h5", LongRun(full_steps=1), losses)) as trace:
        assert full(trace) == [1]


def test_a_gradient_with_a_nan_is_an_anomaly_though_the_loss_is_fine(tmp_path: Path) -> None:
    odd = gradients(4)
    odd.records[1].data[2, 3] = np.nan  # type: ignore[index]
    with open_trace(write(tmp_path / "a.h5", LongRun(full_steps=1, around=1), [1.0] * 7, at4=odd)) as trace:
        assert full(trace) == [1, 3, 4, 5]


def test_a_run_cut_off_while_steps_are_written_again_keeps_the_thinned_ones(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "a.h5", env={}, declared={})
    thinner = Thinner(writer, LongRun(full_steps=0, around=1))
    thinner.write_step(0, [INIT], None)
    for step in (1, 2):
        thinner.write_step(step, [loss(step), gradients(step)], {})
    # What a kill leaves: the row is on disk, its commit is not.
    writer._write_row(gradients(2), {}, "again/")
    writer._file.flush()
    shutil.copyfile(tmp_path / "a.h5", tmp_path / "killed.h5")
    with open_trace(tmp_path / "killed.h5") as trace:
        assert full(trace) == []
        assert check_trace(trace).problems == ()
    writer.finish()
    with open_trace(tmp_path / "a.h5") as trace:
        assert check_trace(trace).problems == ()


def test_a_step_is_written_again_once_and_only_after_it_was_written(tmp_path: Path) -> None:
    from tracer.errors import BadUsage

    writer = TraceWriter(tmp_path / "a.h5", env={}, declared={})
    writer.write_step(0, [INIT])
    writer.write_step(1, [thin(gradients(1))])
    with pytest.raises(BadUsage):
        writer.rewrite_step(2, [gradients(2)])
    writer.rewrite_step(1, [gradients(1)])
    with pytest.raises(BadUsage):
        writer.rewrite_step(1, [gradients(1)])
    writer.finish()


def test_a_trace_keeps_to_its_size_by_thinning_and_then_by_stopping(tmp_path: Path) -> None:
    limit, shape = 3_000_000, (64, 1024)
    path = write(tmp_path / "a.h5", LongRun(max_bytes=limit), [1.0] * 400, shape)
    assert path.stat().st_size <= limit
    with open_trace(path) as trace:
        kept = full(trace)
        assert 1 <= len(kept) < len(trace.steps) - 1
        assert kept == list(range(1, len(kept) + 1))
    small = write(tmp_path / "b.h5", LongRun(max_bytes=150_000), [1.0] * 400, shape)
    assert small.stat().st_size <= 150_000
    with open_trace(small) as trace:
        assert not trace.finished
        assert "--max-size" in trace.end["reason"]


def test_thinning_keeps_states_and_what_was_never_stored() -> None:
    zero = Record("z", np.zeros((64, 64), np.float32), "float32", (64, 64))
    absent = Record("n", None, "float32", (4,), state=State.NONE)
    row = thin(Row(Phase.GRAD, 1, WHOLE_STEP, (zero, absent)))
    assert [record.state for record in row.records] == [State.ZERO, State.NONE]
    assert row.records[0].sketched
    assert row.records[1] is absent


def test_the_estimate_counts_what_a_step_of_adam_holds() -> None:
    trained = Record("w", np.ones((1000, 4), np.float32), "float32", (1000, 4))
    frozen = Record("f", np.ones((1000, 4), np.float32), "float32", (1000, 4), stored=False)
    scale = Record("s", np.array(2.0), "float64", ())
    size = estimate([trained, frozen, scale], Phase, None, {"train.steps": 10})
    assert (size.tensors, size.step_bytes, size.steps) == (1, 4 * 16_000, 10)
    assert size.sentence() == "1 trainable tensors, about 64.0 kB a step, 640.0 kB for 10 steps"
    assert size.sentence(3).endswith("192.0 kB for 3 steps, 7 more thinned")
    assert estimate([trained], Phase, (4, 6), {"train.steps": 10}).steps == 3
    assert estimate([trained], Phase, None, {}).sentence().endswith("a step")


def test_sizes_are_read_with_decimal_units() -> None:
    assert [parse_bytes(text) for text in ("2GB", "500 MB", "1.5k", "1048576", "10b")] == [
        2 * 10**9, 5 * 10**8, 1500, 1048576, 10,
    ]  # fmt: skip
    for text in ("", "GB", "-1", "two", "inf"):
        with pytest.raises(ValueError):
            parse_bytes(text)
    assert human_bytes(2e12) == "2.0 TB"


def test_a_size_that_is_none_is_refused_with_an_example() -> None:
    from tracer.cli.record import record

    said = CliRunner().invoke(record, ["-o", "x.h5", "--max-size", "huge", "--", "python", "x.py"])
    assert said.exit_code == 2
    assert "500MB" in said.output


def test_a_size_that_no_trace_can_keep_is_refused(tmp_path: Path) -> None:
    from tracer.cli.record import record

    asked = ["-o", str(tmp_path / "x.h5"), "--max-size"]
    said = CliRunner().invoke(record, [*asked, "100kB", "--", "python", "x.py"])
    assert said.exit_code == 2
    assert "give 1MB or more" in said.output
    assert "give 1MB or more" not in CliRunner().invoke(record, [*asked, "1MB", "--", "python", "x.py"]).output
