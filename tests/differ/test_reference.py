"""What a reference says decides where the inputs say too little, and never hides what differs although the inputs agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from differ import DiffOptions, DiffResult, Verdict, diff
from differ.reference import Measured, MeasuredStep, References
from tests.builders import Run, Trainer, make_trace

STEPS = (1, 2, 3)
NAMES = tuple(Trainer(Run()).params)


def measured(*, losses: float, grads: float) -> Measured:
    """A trace of which every loss and every gradient misses the reference by so much."""
    steps = tuple(
        MeasuredStep(
            step, 1.0, {0: losses, 1: losses}, dict.fromkeys(NAMES, grads), grads, "mean", "mean of means", (0.5, 0.5)
        )
        for step in STEPS
    )
    return Measured("x.h5", "x", "torch", "float32", "base", "float32", steps)


def compared(folder: Path, fault: str | None, a: Measured, b: Measured) -> DiffResult:
    one, other = make_trace(folder / "a.h5"), make_trace(folder / "b.h5", fault=fault)
    return diff(one, other, DiffOptions(reference=References(a, b)))


@pytest.mark.parametrize("fault", ["grad_element", "grad_zero"])
def test_a_gradient_that_differs_is_found_though_neither_side_s_loss_follows_the_reference(
    fault: str, tmp_path: Path
) -> None:
    wrong = measured(losses=0.5, grads=0.5)

    result = compared(tmp_path, fault, wrong, wrong)

    assert result.first is not None
    assert (result.first.step, result.first.phase) == (2, "grad")


def test_runs_that_agree_are_the_same_though_neither_follows_the_reference(tmp_path: Path) -> None:
    wrong = measured(losses=0.5, grads=0.5)

    assert compared(tmp_path, None, wrong, wrong).verdict is Verdict.SAME


def test_a_gradient_behind_a_loss_that_was_found_not_to_follow_is_no_finding_of_its_own(tmp_path: Path) -> None:
    right, wrong = measured(losses=0.0, grads=0.0), measured(losses=0.5, grads=0.5)

    result = compared(tmp_path, "loss_factor", right, wrong)

    assert [finding.phase for finding in result.findings] == ["loss"] * len(result.findings)
    assert result.findings
