"""The file: what is written comes back, bit for bit, and needs nothing but h5py."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tracer.rows import gradients, loss, one_of_each, references
from tracer.dtypes import DTYPES, bf16_to_float32, float32_to_bf16
from tracer.errors import BadUsage, Empty, NotFound
from tracer.packing import statistics
from tracer.reader import open_trace
from tracer.schema import INDEX_FIELDS, WHOLE_STEP, Phase, Record, Row, State
from tracer.writer import TraceWriter


def write(path: Path, steps: int = 5, finish: bool = True) -> Path:
    writer = TraceWriter(path, env={"python": "3.11"}, declared={"lora.rank": 8})
    writer.write_step(0, [one_of_each()])
    for step in range(1, steps + 1):
        writer.write_step(step, [gradients(step), loss(step, 0), loss(step, 1), references(step)], {"compiled": True})
    if finish:
        writer.finish()
    return path


def test_every_state_and_dtype_comes_back(tmp_path: Path) -> None:
    with open_trace(write(tmp_path / "a.h5")) as trace:
        row = trace.row(Phase.INIT, 0)
        assert row is not None
        states = {entry.name: row.state(i) for i, entry in enumerate(row.layout.entries)}
        assert states["zeros"] is State.ZERO
        assert states["absent"] is State.NONE
        assert states["lost"] is State.UNRECORDED
        assert states["turned"] is State.VALUE
        written = one_of_each()
        for i, (entry, record) in enumerate(zip(row.layout.entries, written.records, strict=True)):
            assert (entry.name, entry.dtype, entry.shape) == (record.name, record.dtype, record.shape)
            if record.stored and record.data is not None:
                assert row.read(i).tobytes() == np.ascontiguousarray(record.data).tobytes()
        assert trace.env == {"python": "3.11"}
        assert trace.declared == {"lora.rank": 8}
        assert trace.observed == {"compiled": True}
        assert trace.finished


def test_a_frozen_weight_is_kept_as_digest_and_statistics(tmp_path: Path) -> None:
    with open_trace(write(tmp_path / "a.h5")) as trace:
        row = trace.row(Phase.INIT, 0)
        assert row is not None
        frozen, tied = row.layout.positions["frozen"], row.layout.positions["tied"]
        assert row.stats[frozen].tolist() == [1.0, 0.0, 1.0, 0.5, 1.0, 2.0, 1.0]
        assert row.digests[frozen] == row.digests[tied]
        assert any(row.digests[frozen].tobytes())
        with pytest.raises(ValueError, match="digest and statistics only"):
            row.read(frozen)


def test_a_reference_reads_what_it_points_to_and_takes_no_room(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with open_trace(path) as trace:
        grad, clipped = trace.row(Phase.GRAD, 3), trace.row(Phase.CLIPPED_GRAD, 3)
        assert grad is not None
        assert clipped is not None
        np.testing.assert_array_equal(clipped.read(2), grad.read(2))
        assert clipped.digests.tobytes() == grad.digests.tobytes()
        np.testing.assert_array_equal(clipped.stats, grad.stats)
    with h5py.File(path) as file:
        assert set(file["clipped_grad/0"]) == {"index", "rows", "digest", "state"}


def test_h5py_alone_reads_the_file_as_documented(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5", steps=3)
    with h5py.File(path) as file:
        assert file.attrs["format"] == 1
        assert int(file["committed"][0]) == 4
        assert json.loads(file["meta/declared"][()])["lora.rank"] == 8
        layout = file["grad/0"]
        index = layout["index"][...]
        assert index.dtype.names == tuple(name for name, _ in INDEX_FIELDS)
        entry = index[1]
        row = int(np.flatnonzero(layout["rows"]["step"] == 2)[0])
        start, shape = int(entry["offset"]), [int(n) for n in entry["shape"].decode().split(",")]
        values = layout[entry["dataset"].decode()][row, start : start + int(np.prod(shape))].reshape(shape)
        expected = gradients(2).records[1].data
        assert expected is not None
        np.testing.assert_array_equal(values, expected)
        # bfloat16 is a true float: h5py hands out numbers, not bits.
        brain = file["init/0/bfloat16"]
        data = one_of_each().records[2].data
        assert data is not None
        assert brain.dtype == np.float32
        assert brain.id.get_type().get_size() == 2
        np.testing.assert_array_equal(brain[0], bf16_to_float32(data).reshape(-1))


def test_rows_of_changing_shape_get_layouts_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writer = TraceWriter(path, env={}, declared={})
    widths = [7, 9, 7, 11, 9, 7]
    for step, width in enumerate(widths):
        ids = np.arange(2 * width, dtype=np.int64).reshape(2, width)
        writer.write_step(step, [Row(Phase.BATCH, step, 0, (Record("input_ids", ids, "int64", ids.shape),))])
    writer.finish()
    with open_trace(path) as trace:
        shapes = [trace.row(Phase.BATCH, step, 0).read(0).shape for step in trace.steps]  # type: ignore[union-attr]
        assert shapes == [(2, width) for width in widths]
    with h5py.File(path) as file:
        assert len(file["batch"]) == 3


def test_many_more_steps_than_one_allocation(tmp_path: Path) -> None:
    with open_trace(write(tmp_path / "a.h5", steps=150)) as trace:
        assert trace.steps == tuple(range(151))
        for step in (1, 16, 17, 149, 150):
            row = trace.row(Phase.GRAD, step)
            assert row is not None
            np.testing.assert_array_equal(row.read(3), gradients(step).records[3].data)  # type: ignore[arg-type]


def test_equal_rows_have_equal_seals_and_other_rows_do_not(tmp_path: Path) -> None:
    with open_trace(write(tmp_path / "a.h5")) as a, open_trace(write(tmp_path / "b.h5")) as b:
        seals = {(row.phase, row.step, row.micro_batch): row.seal for row in a.rows()}
        assert all(seals[row.phase, row.step, row.micro_batch] == row.seal for row in b.rows())
        assert len(set(seals.values())) == len(seals)


def test_values_logged_after_a_step_belong_to_it(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    writer = TraceWriter(path, env={}, declared={})
    evaluation = Row(Phase.EVAL, 1, WHOLE_STEP, (Record("accuracy", np.array(0.5), "float64", ()),))
    writer.write_step(0, [one_of_each()])
    writer.write_step(1, [gradients(1)])
    writer.write_step(1, [evaluation])
    writer.write_step(2, [gradients(2)])
    writer.finish()
    with open_trace(path) as trace:
        assert trace.steps == (0, 1, 2)
        row = trace.row(Phase.EVAL, 1)
        assert row is not None
        assert row.read(0) == 0.5


def test_a_trace_without_an_end_is_readable_and_unfinished(tmp_path: Path) -> None:
    with open_trace(write(tmp_path / "a.h5", finish=False)) as trace:
        assert not trace.finished
        assert trace.last_step == 5


def test_a_step_out_of_order_is_refused(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "a.h5", env={}, declared={})
    writer.write_step(1, [gradients(1)])
    with pytest.raises(BadUsage, match="step 1 was written after step 1"):
        writer.write_step(1, [gradients(1)])
    writer.finish()


def test_an_existing_file_is_not_replaced_unless_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    with pytest.raises(BadUsage, match="exists already"):
        TraceWriter(path, env={}, declared={})
    TraceWriter(path, env={}, declared={}, overwrite=True).finish()
    with pytest.raises(Empty):
        open_trace(path)


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        TraceWriter(tmp_path / "no" / "a.h5", env={}, declared={})


FLOATS = npst.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32))


@settings(max_examples=60, deadline=None)
@given(FLOATS)
def test_bfloat16_rounds_like_float32_truncated_to_nearest_even(values: np.ndarray) -> None:
    back = bf16_to_float32(float32_to_bf16(values))
    again = bf16_to_float32(float32_to_bf16(back))
    np.testing.assert_array_equal(back, again)
    finite = np.isfinite(values) & (np.abs(values) < 3e38) & (np.abs(values) > 1e-37)
    np.testing.assert_allclose(back[finite], values[finite], rtol=2**-8)
    assert np.array_equal(np.isnan(back), np.isnan(values))


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted(DTYPES)))
def test_every_bit_pattern_of_every_dtype_survives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, dtype: str
) -> None:
    kind = DTYPES[dtype]
    raw = data.draw(st.binary(min_size=0, max_size=8 * kind.itemsize))
    raw = raw[: len(raw) // kind.itemsize * kind.itemsize]
    if dtype == "bool":
        raw = bytes(byte & 1 for byte in raw)
    values = np.frombuffer(raw, kind)
    path = tmp_path_factory.mktemp("bits") / "a.h5"
    writer = TraceWriter(path, env={}, declared={})
    writer.write_step(0, [Row(Phase.INIT, 0, WHOLE_STEP, (Record("x", values, dtype, values.shape),))])
    writer.finish()
    with open_trace(path) as trace:
        row = trace.row(Phase.INIT, 0)
        assert row is not None
        assert row.read(0).tobytes() == raw


@settings(max_examples=60, deadline=None)
@given(npst.arrays(np.float32, st.integers(1, 50), elements=st.floats(width=32)))
def test_statistics_are_those_of_the_finite_elements(values: np.ndarray) -> None:
    l2, low, high, mean, nan, inf, zeros = statistics(values, "float32")
    finite = values[np.isfinite(values)].astype(np.float64)
    assert nan == np.isnan(values).sum()
    assert inf == np.isinf(values).sum()
    assert zeros == (values == 0).sum()
    if finite.size:
        assert (low, high) == (finite.min(), finite.max())
        np.testing.assert_allclose([l2, mean], [np.sqrt((finite**2).sum()), finite.mean()], rtol=1e-12, atol=1e-300)
    else:
        assert (l2, low, high, mean) == (0, 0, 0, 0)
