"""`model.mode`: one side in evaluation mode where the other trains, as observed and as the records of later steps say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import diff
from tests.builders import F32
from tests.differ.causes.rows import gradients, shown, write
from tracer.schema import Phase

DROPOUT = {"lora.dropout": 0.1}


def run(
    path: Path,
    modes: tuple[Any, ...],
    *,
    observed: dict[str, Any] = DROPOUT,
    other: int = 0,
    factor: float = 1.0,
    says: bool = True,
) -> Path:
    """Steps 1, 2, … in the modes given (1.0, 0.0 or 0.5); the gradients of step `other` are others, or times `factor`."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for step, mode in enumerate(modes, start=1):
        hparams = {"group0.lr": np.float64(0.1)}
        if mode != modes[0]:
            hparams["reported.model.training"] = np.float64(mode)
        rows[Phase.HPARAMS, step] = hparams
        grads = gradients(step + (50 if step == other and factor == 1.0 else 0))
        by = F32(factor if step == other else 1.0)
        rows[Phase.GRAD, step] = {name: (values * by).astype(F32) for name, values in grads.items()}
    words = {1.0: True, 0.0: False, 0.5: "mixed"}
    seen = {**observed, **({"model.training": words[modes[0]]} if says else {})}
    return write(path, rows, observed=seen)


@pytest.mark.parametrize(
    ("modes", "at", "words"),
    [
        (
            (1.0, 0.0, 0.0),
            2,
            "b computes step 2 in evaluation mode (dropout 0.1 is off), a in training mode (dropout 0.1)",
        ),
        (
            (0.0, 0.0, 0.0),
            1,
            "b computes step 1 in evaluation mode (dropout 0.1 is off), a in training mode (dropout 0.1)",
        ),
        (
            (1.0, 1.0, 0.5),
            3,
            "b computes step 3 with some modules in evaluation mode (dropout 0.1), a in training mode (dropout 0.1)",
        ),
    ],
)
def test_a_side_in_evaluation_mode_is_told_at_the_first_finding(
    modes: tuple[float, ...], at: int, words: str, tmp_path: Path
) -> None:
    a, b = run(tmp_path / "a.h5", (1.0, 1.0, 1.0)), run(tmp_path / "b.h5", modes, other=at)

    there, back = diff(a, b), diff(b, a)

    assert shown(there) == shown(back) == ["model.mode"]
    cause, mirrored = there.causes[0], back.causes[0]
    assert (cause.step, cause.phase, cause.side, cause.explains) == (at, "grad", "b", None)
    assert cause.names == tuple(sorted(gradients()))
    assert cause.summary == f"{words}; observed, its effect is not tested"
    assert (mirrored.side, mirrored.names) == ("a", cause.names)


def test_a_tested_cause_is_shown_in_its_place(tmp_path: Path) -> None:
    a = run(tmp_path / "a.h5", (1.0, 1.0))
    b = run(tmp_path / "b.h5", (1.0, 0.0), other=2, factor=3.0)

    assert shown(diff(a, b)) == ["grad.scale"]


@pytest.mark.parametrize(
    ("modes", "observed", "says"),
    [
        ((1.0, 1.0), DROPOUT, True),
        ((1.0, 0.0), {"lora.dropout": 0.0}, True),
        ((1.0, 1.0), DROPOUT, False),
    ],
    ids=["both train", "no dropout", "mode not seen"],
)
def test_without_two_modes_or_without_dropout_it_is_not_said(
    modes: tuple[float, ...], observed: dict[str, Any], says: bool, tmp_path: Path
) -> None:
    a = run(tmp_path / "a.h5", (1.0, 1.0), observed=observed)
    b = run(tmp_path / "b.h5", modes, observed=observed, other=2, says=says)

    result = diff(a, b)

    assert result.findings
    assert shown(result) == []


def test_dropout_that_is_not_known_is_not_named(tmp_path: Path) -> None:
    a = run(tmp_path / "a.h5", (1.0, 1.0), observed={})
    b = run(tmp_path / "b.h5", (1.0, 0.0), observed={}, other=2)

    (cause,) = [cause for cause in diff(a, b).causes if cause.id == "model.mode"]
    assert cause.summary.startswith("b computes step 2 in evaluation mode, a in training mode;")


def test_modes_that_differ_without_a_finding_are_no_cause(tmp_path: Path) -> None:
    result = diff(run(tmp_path / "a.h5", (1.0, 1.0)), run(tmp_path / "b.h5", (1.0, 0.0)))

    assert not result.findings
    assert shown(result) == []


def test_dropout_that_is_tested_says_that_the_other_side_evaluates(tmp_path: Path) -> None:
    name, rng = "model.layers.0.self_attn.q_proj.lora_dropout", np.random.default_rng(0)
    values = rng.normal(size=(64, 32)).astype(F32)
    dropped = np.where(rng.uniform(size=values.shape) < 0.1, 0, values / F32(0.9)).astype(F32)

    def of(path: Path, output: np.ndarray, mode: bool) -> Path:
        rows = {
            (Phase.HPARAMS, 1): {"group0.lr": np.float64(0.1)},
            (Phase.FORWARD, 1): {"positions": np.argwhere(np.ones((4, 16))), name: output},
        }
        return write(path, rows, observed={**DROPOUT, "model.training": mode})

    (cause,) = [
        cause
        for cause in diff(of(tmp_path / "a.h5", dropped, True), of(tmp_path / "b.h5", values, False)).causes
        if cause.id == "rng.dropout"
    ]
    assert cause.summary.endswith("b drops none, in evaluation mode")
