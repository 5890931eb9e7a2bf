"""pytest plugin `steptrace`: a training run in a test, compared with a baseline that is kept beside the test.

    def test_lora(trace_regression):
        trace_regression.check(train)        # a callable is recorded in this process; a path is a trace that there is already

`pytest --trace-update` rewrites baselines that changed and fails those tests, so that the change is looked at; `pytest
--trace-artifacts=DIR` keeps the trace and the reports of a failure.  Every file that is written has a name of its own test, so
tests may run in parallel.  The plugin is loaded into every pytest run, so it imports nothing of ours before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from differ.result import DiffResult

FOLDER: Final = "traces"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of this plugin."""
    group = parser.getgroup("steptrace", "training traces (steptrace)")
    group.addoption(
        "--trace-update",
        action="store_true",
        help="Rewrite baseline traces that changed, and fail those tests: review them.",
    )
    group.addoption(
        "--trace-artifacts", metavar="DIR", help="Keep the trace and the reports of each failed comparison in DIR."
    )


@pytest.fixture
def trace_regression(request: pytest.FixtureRequest, tmp_path: Path) -> TraceRegression:
    """Compare a training run with its baseline: `trace_regression.check(train)`."""
    artifacts = request.config.getoption("--trace-artifacts")
    return TraceRegression(
        test=request.node.nodeid,
        file=request.node.path,
        scratch=tmp_path,
        update=bool(request.config.getoption("--trace-update")),
        artifacts=request.config.invocation_params.dir / artifacts if artifacts else None,
    )


class TraceRegression:
    """The fixture's value: compares runs of one test with their baselines."""

    def __init__(self, *, test: str, file: Path, scratch: Path, update: bool, artifacts: Path | None) -> None:
        self._test = test
        self._file = file
        self._scratch = scratch
        self._update = update
        self._artifacts = artifacts
        self._checks = 0

    def check(
        self,
        run: str | os.PathLike[str] | Callable[[], object],
        baseline: str | os.PathLike[str] | None = None,
        *,
        policy: str | os.PathLike[str] | None = None,
        steps: tuple[int, int] | None = None,
        only: tuple[str, ...] = (),
        omit: tuple[str, ...] = (),
        fingerprint: bool | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> DiffResult:
        """Fail the test unless a run is the same as its baseline; returns the comparison.

        `run`: a callable that trains, recorded with `tracer.record(…, **record)`, or the path of a trace.  `baseline`: its path,
        relative to the test's file; by default `traces/` beside the file, named after the test.  `policy`, `steps`,
        `only`, `omit`: as for `trace diff`.  `fingerprint`: whether a baseline that is written holds sketches (None: as it is).
        """
        __tracebackhide__ = True
        from differ.baseline import compare, update
        from differ.options import DiffOptions
        from differ.policy import default_policy, load_policy
        from tracer.errors import TraceError

        self._checks += 1
        golden = self._baseline(baseline)
        try:
            options = DiffOptions(
                policy=default_policy() if policy is None else load_policy(self._file.parent / policy),
                only=only, omit=omit, steps=steps, series=self._artifacts is not None,
            )  # fmt: skip
            if not self._update and not golden.is_file():
                pytest.fail(
                    f"no baseline: {golden} does not exist; make it with `pytest --trace-update`", pytrace=False
                )
            trace = self._recorded(run, dict(record or {}))
            if self._update:
                updated = update(golden, trace, options, fingerprint=fingerprint)
                if updated.why or updated.result is None:
                    report = _text(updated.result) if updated.result is not None else ""
                    pytest.fail(f"{report}wrote {golden} because {updated.why}; review and commit it", pytrace=False)
                return updated.result
            result = compare(golden, trace, options)
        except TraceError as error:
            pytest.fail(f"trace: {error.line()}", pytrace=False)
        if result.verdict.exit_code != 0:
            lines = self._keep(result, trace)
            pytest.fail(
                f"{_text(result)}  baseline {golden}\n" + "".join(f"  {line}\n" for line in lines), pytrace=False
            )
        return result

    def _recorded(self, run: str | os.PathLike[str] | Callable[[], object], options: dict[str, Any]) -> Path:
        """The trace of a run."""
        if not callable(run):
            return Path(run)
        import tracer

        path = self._scratch / f"run-{self._checks}.h5"
        with tracer.record(path, overwrite=True, **options):
            run()
        return path

    def _baseline(self, given: str | os.PathLike[str] | None) -> Path:
        """Where the baseline is: given, or named after the test and the number of this check in it."""
        if given is not None:
            return self._file.parent / given
        return self._file.parent / FOLDER / f"{self._name()}.h5"

    def _name(self) -> str:
        """Name of this check's files: `test_lora.test_sgd`, and a number from the second check of a test on."""
        from differ.baseline import safe_name

        _, _, test = self._test.partition("::")
        number = f".{self._checks}" if self._checks > 1 else ""
        return safe_name(f"{self._file.stem}.{test.replace('::', '.')}{number}")

    def _keep(self, result: DiffResult, trace: Path) -> list[str]:
        from differ.baseline import keep, safe_name

        if self._artifacts is None:
            return []
        # Two folders may have test files of one name: the whole id is in the name.
        number = f".{self._checks}" if self._checks > 1 else ""
        return keep(result, trace, self._artifacts, safe_name(self._test.replace("::", ".").replace("/", ".") + number))


def _text(result: DiffResult) -> str:
    from differ.reporters import Style, reporter

    return reporter("text")(result, Style(width=100))
