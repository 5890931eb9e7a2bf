"""The pytest plugin, in test runs of its own: green, red, rewritten, kept, and in parallel."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.builders import make_trace

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
TEST = """
import pytest
from tests.driven import drive

@pytest.mark.parametrize("seed", [0, 1])
def test_training(trace_regression, seed):
    trace_regression.check(lambda: drive({fault!r}, seed=seed))
"""


def pytester_run(pytester: pytest.Pytester, *arguments: str, workers: int = 0) -> pytest.RunResult:
    """Run pytest in a process of its own, with the plugin as installed, or named if this checkout is not installed."""
    installed = any(entry.name == "steptrace" for entry in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "differ.pytest_plugin"]
    parallel = ["-n", str(workers)] if workers else ["-p", "no:xdist"]
    return pytester.runpytest_subprocess(*plugin, *parallel, *arguments)


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "200")
    pytester.makepyfile(test_lora=TEST.format(fault=None))
    return pytester


def baselines(project: pytest.Pytester) -> list[str]:
    return sorted(path.name for path in (project.path / "traces").iterdir())


def test_without_a_baseline_a_test_fails_with_the_option_that_makes_one(project: pytest.Pytester) -> None:
    done = pytester_run(project)
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(["*no baseline*test_lora.test_training*--trace-update*"])
    assert not (project.path / "traces").exists()


def test_update_writes_fails_and_then_stays_green_until_a_fault_is_planted(project: pytest.Pytester) -> None:
    first = pytester_run(project, "--trace-update", workers=2)
    first.assert_outcomes(failed=2)
    first.stdout.fnmatch_lines(["*wrote *test_lora.test_training*because it did not exist; review and commit it*"])
    assert len(baselines(project)) == 2
    pytester_run(project, "--trace-update").assert_outcomes(passed=2)

    project.makepyfile(test_lora=TEST.format(fault="clip_value"))
    red = pytester_run(project, "--trace-artifacts=out", workers=2)
    red.assert_outcomes(failed=2)
    red.stdout.fnmatch_lines(["*DIVERGED at step 1, clipped_grad, model.layers.*"])
    kept = sorted(path.name for path in (project.path / "out").iterdir())
    for ending in (".h5", ".txt", ".md", ".json", ".junit.xml"):
        assert sum(name.endswith(ending) for name in kept) == 2, kept

    updated = pytester_run(project, "--trace-update")
    updated.assert_outcomes(failed=2)
    updated.stdout.fnmatch_lines(
        ["*DIVERGED at step 1, clipped_grad*", "*because the run diverged; review and commit it*"]
    )


def test_a_trace_is_compared_by_its_path_and_two_checks_have_two_baselines(pytester: pytest.Pytester) -> None:
    make_trace(pytester.path / "same.h5")
    make_trace(pytester.path / "golden.h5")
    make_trace(pytester.path / "other.h5", fault="lr")
    pytester.makepyfile(
        """
        from pathlib import Path
        HERE = Path(__file__).parent

        def test_same(trace_regression):
            result = trace_regression.check(HERE / "same.h5", "golden.h5")
            assert result.counts.compared > 100

        def test_other(trace_regression):
            trace_regression.check(HERE / "other.h5", "golden.h5")

        def test_not_looked_at(trace_regression):
            trace_regression.check(HERE / "other.h5", "golden.h5", omit=("group0.lr",), steps=(0, 0))

        def test_missing(trace_regression):
            trace_regression.check(HERE / "missing.h5", "golden.h5")

        def test_twice(trace_regression):
            trace_regression.check(HERE / "same.h5", "traces/test_x.test_twice.h5")
            trace_regression.check(HERE / "same.h5")
        """
    )
    done = pytester_run(pytester)
    done.assert_outcomes(passed=2, failed=3)
    done.stdout.fnmatch_lines(["*DIVERGED at step 1, hparams, group0.lr*", "*missing.h5 does not exist*not-found*"])


def test_a_callable_that_trains_nothing_or_whose_recording_stops_fails(project: pytest.Pytester) -> None:
    (project.path / "golden.h5").write_bytes(make_trace(project.path / "x.h5").read_bytes())
    project.makepyfile(
        test_lora="""
        from tests.driven import drive

        def test_nothing(trace_regression):
            trace_regression.check(lambda: None, "golden.h5")

        def test_stopped(trace_regression):
            trace_regression.check(lambda: drive(stop="the disk is full"), "golden.h5")
        """
    )
    done = pytester_run(project)
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(["*without an optimizer step*nothing-recorded*", "*the disk is full*recording-stopped*"])


def test_a_fingerprint_can_be_the_baseline(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_lora="""
        from tests.driven import drive

        def test_training(trace_regression):
            trace_regression.check(drive, fingerprint=True)
        """
    )
    pytester_run(project, "--trace-update").assert_outcomes(failed=1)
    pytester_run(project).assert_outcomes(passed=1)


def test_the_plugin_loads_nothing_before_it_is_used(project: pytest.Pytester) -> None:
    project.makepyfile(
        test_lora="""
        import sys

        def test_modules():
            assert not {"h5py", "numpy", "differ.engine", "tracer.reader"} & set(sys.modules)
        """
    )
    pytester_run(project).assert_outcomes(passed=1)
