"""Parameters that an optimizer was not given: named, and what follows from it is no news."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import Verdict, diff
from tests.differ.causes.plant import A, B, causes, edited, ids, mirrored, with_data
from tests.differ.conftest import Compare
from tracer.reader import open_trace
from tracer.schema import Phase, Record
from tracer.shrink import shrink


@pytest.mark.parametrize(
    ("unheld", "names", "words"),
    [
        ("lora_B", B, "lora_B (3 of 6 parameters)"),
        ("lora_A", A, "lora_A (3 of 6 parameters)"),
        (B[1], (B[1],), B[1]),
        ("layers.2.", (A[2], B[2]), f"{A[2]}, {B[2]}"),
    ],
)
@pytest.mark.parametrize("steps", [1, 4])
def test_parameters_that_one_optimizer_does_not_hold_are_the_one_cause(
    unheld: str, names: tuple[str, ...], words: str, steps: int, compare: Compare, tmp_path: Path
) -> None:
    result = compare(b={"unheld": unheld}, steps=steps)

    (cause,) = causes(result, "optimizer.unheld")
    assert ids(result) == ["optimizer.unheld"]
    assert (cause.step, cause.phase, cause.side, cause.explains) == (1, "clipped_grad", "b", 1.0)
    assert set(cause.names) == set(names)
    assert cause.summary == f"b's optimizer does not hold {words}: trainable there, and never updated; a's does"
    # The model of the next step differs because of it.
    assert {(finding.step, finding.phase) for finding in result.findings} == {(1, "clipped_grad")}

    back = mirrored(tmp_path)
    (cause,) = causes(back, "optimizer.unheld")
    assert (cause.side, set(cause.names)) == ("a", set(names))
    assert {(finding.step, finding.phase) for finding in back.findings} == {(1, "clipped_grad")}


UNSEEN = edited(Phase.PARAM, lambda one: None, name="lora_B")


@pytest.mark.parametrize("clip", [{}, {"clip": "norm", "clip_value": 0.02}, {"optimizer": "sgd"}], ids=str)
def test_parameters_that_are_recorded_no_more_count_as_what_they_were(clip: dict[str, Any], compare: Compare) -> None:
    result = compare(b={"unheld": "lora_B", "edit": UNSEEN}, steps=4, **clip)

    assert ids(result) == ["optimizer.unheld"]
    assert {(finding.step, finding.phase) for finding in result.findings} == {(1, "clipped_grad")}


@pytest.mark.parametrize("phase", [Phase.OPT_STATE, Phase.PARAM])
def test_any_record_of_the_update_that_is_missing_tells(phase: Phase, compare: Compare) -> None:
    what = frozenset({Phase.INIT, Phase.GRAD, phase})
    (cause,) = causes(compare(b={"unheld": "lora_B", "edit": UNSEEN}, what=what), "optimizer.unheld")

    assert (cause.step, cause.phase, set(cause.names)) == (1, phase.label, set(B))


def test_a_parameter_that_something_else_moves_is_held_somewhere(compare: Compare) -> None:
    def moved(one: Record) -> Record:
        assert one.data is not None
        return with_data(one, one.data + np.float32(0.1))

    result = compare(b={"unheld": B[1], "edit": edited(Phase.PARAM, moved, name=B[1])}, steps=2)

    assert not causes(result, "optimizer.unheld")
    assert (1, "param", B[1]) in {(finding.step, finding.phase, finding.name) for finding in result.findings}


def test_sketches_tell_as_well(compare: Compare, tmp_path: Path) -> None:
    compare(b={"unheld": "lora_B"})
    small = []
    for name in "ab":
        small.append(tmp_path / f"small-{name}.h5")
        with open_trace(tmp_path / f"{name}.h5") as trace:
            shrink(trace, small[-1])

    (cause,) = causes(diff(*small), "optimizer.unheld")
    assert (cause.side, set(cause.names)) == ("b", set(B))


def test_an_independent_fault_behind_it_is_still_found(compare: Compare) -> None:
    result = compare(b={"unheld": B[1], "bias_correction": False}, steps=2)

    assert ids(result) == ["optimizer.unheld", "optimizer.bias_correction"]


@pytest.mark.parametrize("both", [{}, {"unheld": "lora_B"}], ids=str)
def test_optimizers_that_hold_the_same_are_the_same(both: dict[str, Any], compare: Compare) -> None:
    assert compare(**both).verdict is Verdict.SAME


def test_a_record_that_is_lost_on_its_way_is_no_parameter_that_is_not_held(compare: Compare) -> None:
    lost = edited(Phase.CLIPPED_GRAD, lambda one: None, name=B[1])
    for result in (compare(b={"edit": lost}), compare("init_names"), compare("grad_missing")):
        assert result.verdict is Verdict.DIVERGED
        assert not causes(result, "optimizer.unheld")
