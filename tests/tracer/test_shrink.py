"""Sketches and fingerprints: what is kept, what is replaced, and that damage to it is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.builders import make_trace
from tests.tracer.rows import one_of_each
from tracer import schema
from tracer.cli.check import check_trace
from tracer.dtypes import float32_to_bf16, is_float
from tracer.errors import BadUsage, Damaged
from tracer.reader import open_trace
from tracer.schema import Phase
from tracer.shrink import shrink, shrink_in_place
from tracer.sketch import BLOCK, sketch, sketch_distance
from tracer.writer import TraceWriter

ROOT = Path(__file__).parents[2]


def shrunk(path: Path, **options: object) -> Path:
    output = path.with_name(f"{path.stem}.fp.h5")
    with open_trace(path) as trace:
        shrink(trace, output, overwrite=True, **options)  # type: ignore[arg-type]
    return output


def straightforward(values: np.ndarray) -> np.ndarray:
    """The definition in tracer/sketch.py, one element at a time."""
    total = np.zeros(61)
    mask = 2**64 - 1
    for i, value in enumerate(values.reshape(-1).tolist()):
        state = (0x7374657074726163 + i // 64 + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
        sign = -1 if (state >> (i % 64)) & 1 else 1
        total[i % 61] += sign * value if np.isfinite(value) else 0.0
    return total.astype(np.float32)


@pytest.mark.parametrize("size", [1, 60, 61, 62, 1000])
def test_a_sketch_is_what_its_definition_says(size: int) -> None:
    values = np.random.default_rng(size).normal(size=size).astype(np.float32)
    values[size // 2] = np.nan if size > 1 else 1.0
    np.testing.assert_allclose(sketch(values, "float32"), straightforward(values), rtol=1e-6)


def test_a_sketch_is_the_same_across_blocks_shapes_and_dtypes() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=BLOCK + 777).astype(np.float32)
    whole = sketch(values, "float32").astype(np.float64)
    parts = np.zeros(61)
    for start in range(0, values.size, 61 * 64):
        piece = np.zeros_like(values)
        piece[start : start + 61 * 64 * 4000] = values[start : start + 61 * 64 * 4000]
        if start % (61 * 64 * 4000) == 0:
            parts += sketch(piece, "float32")
    np.testing.assert_allclose(whole, parts, atol=1e-3)
    small = rng.normal(size=(8, 16)).astype(np.float16)
    np.testing.assert_array_equal(sketch(small, "float16"), sketch(small.reshape(-1).astype(np.float64), "float64"))
    bits = float32_to_bf16(rng.normal(size=50))
    assert sketch(bits, "bfloat16").any()


def test_the_distance_of_two_sketches_estimates_that_of_the_tensors() -> None:
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(200):
        a = rng.normal(size=2048).astype(np.float32)
        b = a + rng.normal(size=2048).astype(np.float32) * np.float32(1e-4)
        true = float(np.linalg.norm(a.astype(np.float64) - b))
        ratios.append(sketch_distance(sketch(a, "float32"), sketch(b, "float32")) / true)
    low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
    assert 0.97 < middle < 1.03
    assert low > 0.82
    assert high < 1.18


def test_a_sketch_that_overflowed_is_infinitely_far() -> None:
    huge = sketch(np.full(61, 1e300), "float64")
    assert sketch_distance(huge, sketch(np.zeros(61), "float64")) == float("inf")
    assert sketch_distance(huge, huge) == float("inf")


def test_a_fingerprint_keeps_digests_states_statistics_and_small_exact_values(tmp_path: Path) -> None:
    path = make_trace(tmp_path / "a.h5")
    with open_trace(path) as a, open_trace(shrunk(path)) as b:
        assert b.fingerprint
        assert not a.fingerprint
        assert (a.steps, a.phases, a.declared, a.observed, a.env) == (b.steps, b.phases, b.declared, b.observed, b.env)
        for one, two in zip(a.rows(), b.rows(), strict=True):
            assert one.address() == two.address()
            assert (one.digests == two.digests).all()
            assert (one.states == two.states).all()
            assert np.array_equal(one.stats, two.stats)
            for i, (mine, theirs) in enumerate(zip(one.layout.entries, two.layout.entries, strict=True)):
                assert (mine.name, mine.shape, mine.alias_of) == (theirs.name, theirs.shape, theirs.alias_of)
                exact = one.phase in (Phase.HPARAMS, Phase.BATCH, Phase.LOSS, Phase.EVAL) or mine.name.endswith("scale")
                if exact:
                    np.testing.assert_array_equal(one.read(i), two.read(i))
                elif one.stored(i) and is_float(mine.dtype):
                    assert two.sketched(i)
                    assert not two.stored(i)
                    np.testing.assert_array_equal(two.read_sketch(i), sketch(one.read(i), mine.dtype))
        assert check_trace(b).problems == ()
        assert check_trace(b).records == check_trace(a).records


def test_every_state_and_dtype_survives(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "a.h5", env={}, declared={})
    writer.write_step(0, [one_of_each()])
    writer.finish()
    with open_trace(tmp_path / "a.h5") as a, open_trace(shrunk(tmp_path / "a.h5")) as b:
        one, two = next(a.rows()), next(b.rows())
        assert (one.digests == two.digests).all()
        assert (one.states == two.states).all()
        assert np.array_equal(one.stats, two.stats)
        assert check_trace(b).problems == ()


def test_a_fingerprint_of_a_fingerprint_holds_the_same(tmp_path: Path) -> None:
    first = shrunk(make_trace(tmp_path / "a.h5"))
    with open_trace(first) as a, open_trace(shrunk(first)) as b:
        assert [row.seal for row in a.rows()] == [row.seal for row in b.rows()]


def test_phases_and_steps_can_be_left_out_and_references_then_stand_for_themselves(tmp_path: Path) -> None:
    path = make_trace(tmp_path / "a.h5")
    with open_trace(shrunk(path, what=frozenset({Phase.CLIPPED_GRAD, Phase.EVAL}), steps=(2, 3))) as trace:
        assert trace.phases == (Phase.INIT, Phase.CLIPPED_GRAD, Phase.EVAL)
        assert trace.steps == (0, 2, 3)
        row = trace.row(Phase.CLIPPED_GRAD, 2)
        assert row is not None
        assert all(not entry.alias_of and entry.sketched for entry in row.layout.entries)
    with open_trace(shrunk(path, what=frozenset({Phase.EVAL}))) as trace:
        assert trace.phases == (Phase.INIT, Phase.EVAL)
        assert trace.steps == (0, 1, 2, 3)


def test_an_unfinished_trace_stays_unfinished(tmp_path: Path) -> None:
    with open_trace(shrunk(make_trace(tmp_path / "a.h5", finished=False))) as trace:
        assert not trace.finished
        assert trace.end["reason"] == "killed"


@pytest.mark.parametrize("table", ["sketch", "stats"])
def test_a_changed_sketch_or_statistic_is_found(tmp_path: Path, table: str) -> None:
    path = shrunk(make_trace(tmp_path / "a.h5"))
    with h5py.File(path, "r+") as file:
        file[f"grad/0/{table}"][0, 0] += 1.0
    with open_trace(path) as trace:
        assert any("sketches of step 1, grad" in problem for problem in check_trace(trace).problems)
        row = trace.row(Phase.GRAD, 1)
        assert row is not None
        with pytest.raises(Damaged):
            row.read_sketch(0)


def test_a_sketch_is_not_mistaken_for_a_tensor(tmp_path: Path) -> None:
    with open_trace(shrunk(make_trace(tmp_path / "a.h5"))) as trace:
        row = trace.row(Phase.GRAD, 1)
        assert row is not None
        with pytest.raises(ValueError, match="digest and statistics only"):
            row.read(0)
        alias = trace.row(Phase.CLIPPED_GRAD, 1)
        assert alias is not None
        assert alias.sketched(0)
        assert not alias.stored(0)
        np.testing.assert_array_equal(alias.read_sketch(0), row.read_sketch(0))
        loss = trace.row(Phase.LOSS, 1, 0)
        assert loss is not None
        with pytest.raises(ValueError, match="no sketch"):
            loss.read_sketch(0)


def test_a_fingerprint_is_much_smaller_where_tensors_are_large(tmp_path: Path) -> None:
    records = tuple(
        schema.Record(f"p{i}", np.random.default_rng(i).normal(size=(64, 256)).astype(np.float32), "float32", (64, 256))
        for i in range(8)
    )
    writer = TraceWriter(tmp_path / "a.h5", env={}, declared={})
    for step in range(8):
        writer.write_step(step, [schema.Row(Phase.PARAM, step, -1, records)])
    writer.finish()
    assert shrunk(tmp_path / "a.h5").stat().st_size < (tmp_path / "a.h5").stat().st_size / 50


def test_in_place_it_is_the_one_or_the_other(tmp_path: Path) -> None:
    path = make_trace(tmp_path / "a.h5")
    shrink_in_place(path)
    with open_trace(path) as trace:
        assert trace.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5"]


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    path = make_trace(tmp_path / "a.h5")
    with open_trace(path) as trace, pytest.raises(BadUsage, match="exists already"):
        shrink(trace, make_trace(tmp_path / "b.h5"))


def test_the_commands_shrink_and_record_fingerprint(tmp_path: Path) -> None:
    path = make_trace(tmp_path / "a.h5")

    def trace(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tracer", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = trace("shrink", path, "-o", tmp_path / "golden.h5")
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stderr
    assert trace("check", tmp_path / "golden.h5").returncode == 0
    assert "sketch" in trace("show", tmp_path / "golden.h5", 1, "grad").stdout
    assert trace("shrink", path, "-o", path).returncode == 2
    assert trace("shrink", path, "-o", tmp_path / "golden.h5").returncode == 2
    program = ROOT / "tests/programs/synthetic.py"
    assert trace("record", "--fingerprint", "-o", tmp_path / "r.h5", "--", "python", program).returncode == 0
    with open_trace(tmp_path / "r.h5") as recorded:
        assert recorded.fingerprint
        assert recorded.finished
