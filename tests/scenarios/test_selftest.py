"""`trace selftest`: identical runs pass, and each way to fail has its exit code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from scenarios import selftest as module
from scenarios.outcome import PARTS, Outcome
from scenarios.selftest import Report
from tests.scenarios.conftest import needs_mlx
from tracer.errors import BadUsage


@needs_mlx
def test_a_recorded_run_is_bit_identical() -> None:
    report = module.check("mlx", {"train.steps": 2, "train.accumulation": 3, "lora.dropout": 0.1})
    assert report == Report("mlx", dict.fromkeys(PARTS, True), recorded=2, steps=2)
    assert report.code == 0


@pytest.mark.parametrize("part", PARTS)
def test_one_part_that_differs_is_not_identical(part: str) -> None:
    report = Report("mlx", {**dict.fromkeys(PARTS, True), part: False}, recorded=2, steps=2)
    assert report.code == 1
    assert "DIFFERS" in report.line()
    assert report.line().endswith("NOT IDENTICAL")


def test_a_part_that_a_program_does_not_leave_behind_is_shown_as_not_known() -> None:
    report = Report("mlx-lm-cli", {"parameters": True, "rng": True}, recorded=2, steps=2)
    assert report.code == 0
    assert report.line().split() == ["mlx-lm-cli", "not", "known", "same", "not", "known", "same", "2/2", "identical"]
    assert Report("mlx-lm-cli", {}, recorded=2, steps=2).code == 1


def test_a_recording_that_missed_a_step_proves_nothing() -> None:
    report = Report("mlx", dict.fromkeys(PARTS, True), recorded=1, steps=2)
    assert report.code == 2
    assert "1/2" in report.line()


def test_a_path_that_cannot_run_has_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(path: str) -> Any:
        raise BadUsage("it is not there")

    monkeypatch.setattr(module, "path_info", absent)
    report = module.check("mlx", {"train.steps": 2})
    assert report.code == 2
    assert "could not run: it is not there" in report.line()


def test_the_worst_report_decides_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = iter(
        [Report("torch", dict.fromkeys(PARTS, True), 2, 2), Report("mlx", dict.fromkeys(PARTS, False), 2, 2)]
    )
    monkeypatch.setattr(module, "check", lambda name, settings, *_, **__: next(reports))
    done = CliRunner().invoke(module.selftest, ["torch", "mlx", "--steps", "2"], standalone_mode=False)
    assert done.return_value == 1
    assert [line.split()[0] for line in done.output.splitlines()] == ["path", "torch", "mlx"]


def test_an_unknown_path_is_refused_before_anything_runs() -> None:
    done = CliRunner().invoke(module.selftest, ["mlx", "unsloth"], standalone_mode=False)
    assert isinstance(done.exception, BadUsage)
    assert done.output == ""


CHANGES: dict[str, dict[str, Any]] = {
    "a loss": {"losses": (1.0, 2.0 + 2.0**-51)},
    "a bit of a parameter": {"parameters": {"a": np.array([1.0, -0.0], np.float32)}},
    "a name": {"parameters": {"b": np.array([1.0, 0.0], np.float32)}},
    "a shape": {"parameters": {"a": np.array([[1.0, 0.0]], np.float32)}},
    "a dtype": {"parameters": {"a": np.array([1.0, 0.0], np.float32).view(np.int32)}},
    "the optimizer": {"optimizer": {"step": np.array(3)}},
    "the generator": {"rng": {"mlx": np.array([0, 2], np.uint32)}},
}


def outcome(**changes: Any) -> Outcome:
    parts: dict[str, Any] = {
        "losses": (1.0, 2.0),
        "parameters": {"a": np.array([1.0, 0.0], np.float32)},
        "optimizer": {"step": np.array(2)},
        "rng": {"mlx": np.array([0, 1], np.uint32)},
    }
    return Outcome(**{**parts, **changes})


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_an_outcome_changes_its_digest_and_no_other(change: str) -> None:
    plain, changed = outcome().digests(), outcome(**CHANGES[change]).digests()
    assert {part for part in PARTS if plain[part] != changed[part]} == set(CHANGES[change])


def test_equal_outcomes_have_equal_digests(tmp_path: Path) -> None:
    assert outcome().digests() == outcome().digests()
