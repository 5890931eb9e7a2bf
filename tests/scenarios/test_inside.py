"""A PyTorch loop against transformers' Trainer, two micro-batches of unequal length a step, recorded with all that is inside it.

The loop takes the mean of the micro-batches' means, Trainer weighs them by their tokens: the only thing that differs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from differ import Verdict, diff
from tests.scenarios.conftest import Once, arm, needs_torch, paths_of, record_all
from tracer.reader import open_trace
from tracer.schema import Phase

pytestmark = needs_torch

SETTINGS = {"train.steps": 1, "train.accumulation": 2, "data.rows": 4}


@pytest.fixture(scope="module")
def traces(once: Once) -> dict[str, Path]:
    def make(folder: Path) -> dict[str, str]:
        inside = {"inside": True}
        loop = record_all("torch", {"torch": {**arm(SETTINGS), **inside}}, folder)
        source = Path(loop["torch"])
        return loop | record_all("hf-trainer", {"hf-trainer": {**arm(SETTINGS, source=source), **inside}}, folder)

    return paths_of(once("inside", make)[1])


@pytest.mark.parametrize(("a", "b", "side"), [("torch", "hf-trainer", "a"), ("hf-trainer", "torch", "b")])
def test_a_mean_of_means_is_told_from_a_mean_over_tokens(traces: dict[str, Path], a: str, b: str, side: str) -> None:
    result = diff(traces[a], traces[b])
    assert result.verdict is Verdict.DIVERGED
    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.micro_batch) == (1, "grad", None)
    assert {found.phase for found in result.findings} == {"grad"}
    (cause,) = [cause for cause in result.causes if cause.id == "grad.mean_of_means"]
    assert cause.side == side
    assert cause.explains == pytest.approx(1.0, abs=1e-4)
    # Losses, and the gradients of the micro-batches, are the same once their weights are undone.
    assert [note.id for note in result.notes if note.id == "loss.weighted"]


def test_everything_before_the_accumulated_gradient_is_the_same_to_the_bit(traces: dict[str, Path]) -> None:
    with open_trace(traces["torch"]) as a, open_trace(traces["hf-trainer"]) as b:
        for number in (0, 1):
            one, other = a.row(Phase.FORWARD, 1, number), b.row(Phase.FORWARD, 1, number)
            assert one is not None
            assert other is not None
            assert one.seal == other.seal
