"""`loss.reduction` with two numbers: positions that are not the supervised ones, and the number of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import Cause, DiffResult
from tests.builders import F32, IGNORED
from tests.differ.causes.rows import compare, gradients, only_cause
from tracer.schema import Phase

# Supervised positions, padding and rows of a micro-batch, and by what a side divides the loss of it.
Divide = Callable[["Batch"], float]


class Batch:
    """A micro-batch of `rows` of `length`, of each row `supervised` positions and `padding` behind them."""

    def __init__(self, number: int, *, rows: int, length: int, supervised: int, padding: int, of: int) -> None:
        rng = np.random.default_rng(number)
        self.micro, self.n, self.rows = of, rows * supervised, rows
        self.positions, self.predicted = rows * length, rows * (length - 1)
        self.unpadded = rows * (length - padding)
        ids = rng.integers(1, 50, size=(rows, length))
        labels, mask = np.full_like(ids, IGNORED), np.ones_like(ids)
        end = length - padding
        labels[:, end - supervised : end] = ids[:, end - supervised : end]
        mask[:, end:] = 0
        self.records = {"input_ids": ids, "labels": labels, "attention_mask": mask, "tokens": np.int64(self.n)}
        self.total = self.n * (4.0 + 0.3 * number)


def run(
    divide: Divide, *, grad: float | None = 1.0, supervised: Sequence[int] = (4, 4), **shape: int
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """One step with a micro-batch for each of `supervised`; its gradients are `grad` times as large, none if that is None."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, each in enumerate(supervised):
        given = {"rows": 3, "length": 11, "padding": 2, **shape}
        batch = Batch(number, supervised=each, of=len(supervised), **given)
        rows[Phase.BATCH, 1, number] = batch.records
        rows[Phase.LOSS, 1, number] = {"loss": F32(batch.total / divide(batch))}
    if grad is not None:
        rows[Phase.GRAD, 1] = {name: (values * F32(grad)).astype(F32) for name, values in gradients().items()}
    return rows


def mean(batch: Batch) -> float:
    return batch.n


def mean_by_micro(batch: Batch) -> float:
    return batch.n * batch.micro


def readings(cause: Cause) -> list[str]:
    assert cause.parameters is not None
    found = cause.parameters["denominators"]
    assert isinstance(found, list)
    return found


def named(result: DiffResult) -> list[str]:
    return [cause.summary for cause in result.causes if "divides the loss" in cause.summary]


@pytest.mark.parametrize(
    ("divide", "positions", "words"),
    [
        (lambda batch: batch.positions, 33, "all positions (33)"),
        (lambda batch: batch.predicted, 30, "all predicted positions (30)"),
        (lambda batch: batch.unpadded, 27, "the positions that are not padding (27)"),
        (lambda batch: batch.rows, 3, "the rows of the batch (3)"),
    ],
)
def test_other_positions_and_the_micro_batches_are_told_together(
    divide: Divide, positions: int, words: str, tmp_path: Path
) -> None:
    cause, mirrored = only_cause(tmp_path, run(mean_by_micro), run(divide, grad=12 / positions), "loss.reduction")

    reading = (
        "{} divides the loss by " + words + ", {} by the supervised positions (12) and the number of micro-batches (2)"
    )
    assert cause.summary == reading.format("b", "a")
    assert cause.side == "b"
    assert mirrored.summary == reading.format("a", "b")


def test_both_numbers_on_one_side_are_told(tmp_path: Path) -> None:
    cause, _ = only_cause(
        tmp_path, run(mean), run(lambda batch: batch.positions * batch.micro, grad=12 / 33), "loss.reduction"
    )

    assert cause.summary == (
        "b divides the loss by all positions (33) and the number of micro-batches (2), a by the supervised positions (12)"
    )


def test_micro_batches_of_unequal_length_need_no_gradients(tmp_path: Path) -> None:
    a = run(mean_by_micro, grad=None, supervised=(4, 3, 1))
    b = run(lambda batch: batch.predicted, grad=None, supervised=(4, 3, 1))

    cause, _ = only_cause(tmp_path, a, b, "loss.reduction")

    assert "all predicted positions (30), a by the supervised positions (12, 9, 3)" in cause.summary


def test_one_number_is_preferred_and_named(tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(mean), run(lambda batch: batch.predicted, grad=12 / 30), "loss.reduction")

    assert cause.summary == (
        "a's loss is 2.5 times b's, and so are its gradients: "
        "b divides the loss by all predicted positions (30), a by the supervised positions (12)"
    )


def test_two_readings_of_one_factor_are_both_said(tmp_path: Path) -> None:
    a = run(mean, rows=2, length=4, padding=0, supervised=(2, 2))
    b = run(lambda batch: batch.positions * batch.micro, grad=0.5, rows=2, length=4, padding=0, supervised=(2, 2))

    cause, _ = only_cause(tmp_path, a, b, "loss.reduction")

    assert cause.side is None
    assert sorted(readings(cause)) == [
        "a divides the loss by the rows of the batch (2), b by the supervised positions (4) and the number of micro-batches (2)",
        "b divides the loss by all positions (8) and the number of micro-batches (2), a by the supervised positions (4)",
    ]


@pytest.mark.parametrize("grad", [1.0, 0.9, 0.8, 1.6])
def test_the_factor_of_two_numbers_is_none_where_the_gradients_do_not_say_so(grad: float, tmp_path: Path) -> None:
    result = compare(tmp_path, run(mean_by_micro), run(lambda batch: batch.predicted, grad=grad))

    assert result.findings
    assert named(result) == []


def test_a_factor_that_one_micro_batch_does_not_have_is_none(tmp_path: Path) -> None:
    def all_but_one(batch: Batch) -> float:
        return batch.predicted * (1.001 if batch.n == 9 else 1.0)

    result = compare(
        tmp_path, run(mean_by_micro, grad=None, supervised=(4, 3, 1)), run(all_but_one, grad=None, supervised=(4, 3, 1))
    )

    assert result.findings
    assert named(result) == []


@pytest.mark.parametrize("supervised", [(4, 4), (4, 3, 1)])
def test_factors_by_chance_get_no_name(supervised: tuple[int, ...], tmp_path: Path) -> None:
    # 4/3, 1.5 and 7 are round, and not made of 12, 27, 30, 33 and 3.
    for ratio in (*map(float, np.random.default_rng(11).uniform(0.05, 20.0, size=4)), 4 / 3, 1.5, 7.0):
        for grad in (ratio, ratio / len(supervised)):
            b = run(lambda batch, by=ratio: batch.n / by, grad=grad, supervised=supervised)  # type: ignore[misc]
            result = compare(tmp_path, run(mean, supervised=supervised), b)

            assert result.findings
            assert named(result) == [], (ratio, grad)


def test_equal_denominators_are_no_finding(tmp_path: Path) -> None:
    assert not compare(tmp_path, run(mean_by_micro), run(mean_by_micro)).findings
