"""Several independent faults in one diff, and one fault in one parameter at one step."""

from __future__ import annotations

from pathlib import Path

import pytest

from differ import diff
from differ.reporters import Style, reporter
from tests.builders import make_trace
from tests.differ.causes.plant import B, ids, scaled
from tests.differ.conftest import NOISE, Compare

FOUR = {"layers": (1, 2), "init_seed": 99, "clip": "value", "clip_value": 0.05, "bias_correction": False}
FOUR_IDS = ["init.names", "init.draw", "clip.value", "optimizer.bias_correction"]


def test_four_faults_at_once_are_four_causes_in_causal_order(compare: Compare) -> None:
    result = compare(b=FOUR)

    assert ids(result) == FOUR_IDS
    assert [(cause.step, cause.phase) for cause in result.causes if cause.id in FOUR_IDS] == [
        (0, "init"), (0, "init"), (1, "clipped_grad"), (1, "param"),
    ]  # fmt: skip
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (0, "init")


def test_the_four_are_the_same_with_a_and_b_in_each_others_place(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", noise=NOISE, **FOUR)

    there, back = diff(a, b), diff(b, a)

    assert sorted(ids(there)) == sorted(ids(back))
    sides = {"a": "b", "b": "a", None: None}
    assert {(cause.id, sides[cause.side]) for cause in there.causes if cause.id in FOUR_IDS} == {
        (cause.id, cause.side) for cause in back.causes if cause.id in FOUR_IDS
    }


def test_the_report_gives_each_cause_a_line_with_its_share(compare: Compare) -> None:
    text = reporter("text")(compare(b=FOUR), Style(width=200))

    lines = [line for line in text.splitlines() if line.split()[:1] == ["cause"]]
    assert len(lines) == 4
    assert "b clips each element to ±0.05; a does not clip (explains 100.0 % of the difference)" in text


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_fault_in_one_parameter_at_one_step_has_its_address(at: int, compare: Compare) -> None:
    result = compare(b={"tamper": scaled(1.2, at=(at,), names=B[2])}, steps=6)

    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.name) == (at, "grad", B[2])
    assert [cause.names for cause in result.causes] == [(B[2],)]


def test_a_clip_and_no_bias_correction_are_both_found_behind_other_gradients(compare: Compare) -> None:
    result = compare(b={"tamper": scaled(1.5), "clip": "norm", "clip_value": 0.1, "bias_correction": False})

    assert ids(result) == ["grad.scale", "clip.norm", "optimizer.bias_correction"]


def test_a_reset_late_and_a_clip_early_are_independent(compare: Compare) -> None:
    result = compare(b={"clip": "value", "clip_value": 0.05, "reset_at": 3}, steps=4)

    assert [(cause.id, cause.step) for cause in result.causes] == [("clip.value", 1), ("optimizer.state_reset", 3)]


def test_four_times_nothing_is_nothing(compare: Compare) -> None:
    assert compare(**FOUR).causes == ()
