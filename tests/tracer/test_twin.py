"""`trace record --twin`: the run as it is, and the run again from a start that is one rounding unit away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tracer.test_cli import ROOT, only_line, trace
from tracer.dtypes import EPSILON, to_float64
from tracer.reader import open_trace
from tracer.schema import Phase

MORE = ["--twins", "2", "--perturb-base"]
PROGRAM = ROOT / "tests" / "programs" / "twins.py"


def record(folder: Path, loop: str, *options: str) -> Path:
    done = trace("record", "-o", folder / "run.h5", *options, "--", "python", PROGRAM, loop)
    assert done.returncode == 0, done.stderr
    return folder / "run.h5"


def start(path: Path, phase: Phase = Phase.INIT, step: int = 0) -> dict[str, np.ndarray]:
    with open_trace(path) as opened:
        row = opened.row(phase, step)
        assert row is not None
        return {
            entry.name: to_float64(row.read(i), entry.dtype)
            for i, entry in enumerate(row.layout.entries)
            if row.stored(i) and not entry.name.startswith("rng.")
        }


def frozen(path: Path) -> dict[str, bytes]:
    with open_trace(path) as opened:
        row = opened.row(Phase.INIT, 0)
        assert row is not None
        entries = {entry.name: i for i, entry in enumerate(row.layout.entries) if not row.stored(i)}
        assert entries
        return {name: row.digests[i].tobytes() for name, i in entries.items()}


@pytest.mark.parametrize(("loop", "options"), [("torch", MORE), ("mlx", MORE), ("mlx-eager", ["--twin"])])
def test_a_twin_starts_one_rounding_unit_away_and_its_steps_see_it(
    tmp_path: Path, loop: str, options: list[str]
) -> None:
    run, base = record(tmp_path, loop, *options), options is MORE
    twins = [tmp_path / "run.twin.h5", *[tmp_path / "run.twin-2.h5"] * base]
    assert sorted(tmp_path.glob("*.h5")) == sorted([run, *twins])

    for seed, twin in enumerate(twins, 1):
        assert start(run).keys() == start(twin).keys()
        for name, values in start(run).items():
            moved, unit = start(twin)[name], EPSILON["bfloat16"] * np.abs(values)
            assert ((moved != values) == (values != 0)).all(), name
            assert (np.abs(moved - values) <= unit).all(), name
            # With a learning rate of 0 the parameters after the update are those that the step has seen.
            np.testing.assert_array_equal(start(twin, Phase.PARAM, 1)[name], moved)
        with open_trace(run) as whole, open_trace(twin) as second:
            said = [second.observed[key] for key in ("twin", "twin.seed", "twin.base")]
            assert said == ["rounding", seed, base]
            assert "twin" not in whole.observed
            losses = [opened.row(Phase.LOSS, 1, 0) for opened in (whole, second)]
            assert losses[0] is not None
            assert losses[1] is not None
            assert losses[0].seal != losses[1].seal, "the first step ran from the start that was not moved"
    digests = [frozen(path) for path in (run, *twins)]
    for name in digests[0]:
        assert len({digest[name] for digest in digests}) == (3 if base else 1)


def test_other_kinds_of_twin_change_the_environment_and_say_when_they_measure_nothing(tmp_path: Path) -> None:
    done = trace(
        "record", "-o", tmp_path / "m.h5", "--twin-by", "threads,eager", "--", PROGRAM, "mlx", OMP_NUM_THREADS="1"
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.h5")} == {"m.h5", "m.twin-threads.h5", "m.twin-eager.h5"}
    assert "m.twin-threads.h5 is the same to the bit" in done.stderr
    with open_trace(tmp_path / "m.twin-eager.h5") as twin:
        assert twin.observed["twin"] == "eager"
        assert "twin.seed" not in twin.observed


def test_an_eager_run_has_no_eager_twin(tmp_path: Path) -> None:
    done = trace("record", "-o", tmp_path / "m.h5", "--twin-by", "eager", "--", PROGRAM, "mlx-eager")
    assert done.returncode == 0
    assert "m.h5 is not compiled" in done.stderr
    assert [path.name for path in tmp_path.glob("*.h5")] == ["m.h5"]


def test_a_run_that_cannot_be_moved_has_no_twin_and_that_is_an_error(tmp_path: Path) -> None:
    done = trace("record", "-o", tmp_path / "m.h5", "--twin", "--", PROGRAM, "mlx-functional")
    assert done.returncode == 2
    assert "no twin" in done.stderr.splitlines()[-1]


def test_the_exit_code_of_the_run_ends_it(tmp_path: Path) -> None:
    done = trace("record", "-o", tmp_path / "m.h5", "--twin", "--", PROGRAM, "fails")
    assert done.returncode == 7
    assert not list(tmp_path.glob("*.twin*"))


def test_nothing_runs_when_a_twin_would_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.twin.h5").write_text("mine")
    done = trace("record", "-o", tmp_path / "m.h5", "--twin", "--", PROGRAM, "fails")
    assert done.returncode == 2
    assert "--force" in only_line(done.stderr)
    assert not (tmp_path / "m.h5").exists()


@pytest.mark.parametrize("options", [["--perturb-base"], ["--twin-by", "magic"], ["--twins", "0"]])
def test_options_of_twins_that_mean_nothing_are_refused(options: list[str], tmp_path: Path) -> None:
    done = trace("record", "-o", tmp_path / "m.h5", *options, "--", PROGRAM, "fails")
    assert done.returncode == 2
