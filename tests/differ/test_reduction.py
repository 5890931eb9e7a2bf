"""Losses under another reduction are the same losses; a changed loss is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import Verdict, diff
from tests.builders import F32, make_trace, record
from tracer.schema import WHOLE_STEP, Phase, Row
from tracer.writer import TraceWriter


def losses(change: Callable[[float, int], float]) -> Callable[[Row], Row]:
    """An edit of a trace: every loss becomes `change(loss, micro_batch)`."""

    def edit(row: Row) -> Row:
        if row.phase is not Phase.LOSS:
            return row
        records = tuple(
            replace(record, data=np.asarray(change(float(record.data), row.micro_batch), np.float32))
            if record.name == "loss" and record.data is not None
            else record
            for record in row.records
        )
        return replace(row, records=records)

    return edit


@pytest.mark.parametrize("count", [2, 3])
def test_a_loss_divided_by_the_micro_batches_is_the_same_and_noted(tmp_path: Path, count: int) -> None:
    a = make_trace(tmp_path / "a.h5", micro_batches=count)
    b = make_trace(tmp_path / "b.h5", micro_batches=count, edit=losses(lambda loss, _: loss / count))
    for result, divides in (
        (diff(a, b), "b each micro-batch's mean"),
        (diff(b, a), "a differentiates each micro-batch's mean"),
    ):
        assert result.verdict is Verdict.SAME
        (note,) = [note for note in result.notes if note.id == "loss.weighted"]
        assert f"{divides} loss divided by their number" in note.summary
        assert result.systematic == ()


@pytest.mark.parametrize(
    "change",
    [lambda loss, _: loss / 4, lambda loss, m: loss / 2 if m == 0 else loss, lambda *_: np.nan],
    ids=["another factor", "one of them", "nan"],
)
def test_any_other_change_of_a_loss_is_found(tmp_path: Path, change: Any) -> None:
    a = make_trace(tmp_path / "a.h5", micro_batches=2)
    b = make_trace(tmp_path / "b.h5", micro_batches=2, edit=losses(change))
    result = diff(a, b)
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (1, "loss")


def test_one_micro_batch_has_one_reduction(tmp_path: Path) -> None:
    a = make_trace(tmp_path / "a.h5", micro_batches=1)
    b = make_trace(tmp_path / "b.h5", micro_batches=1, edit=losses(lambda loss, _: loss / 2))
    result = diff(a, b)
    assert result.first is not None
    assert result.first.phase == "loss"


def test_token_counts_of_one_side_tell_the_reduction_of_both(tmp_path: Path) -> None:
    without = frozenset(Phase) - {Phase.BATCH}
    uneven = {"rows": 2, "micro_batches": 2}
    counts = (10, 8)

    def fewer(row: Row) -> Row:
        if row.phase is not Phase.BATCH:
            return row
        tokens = np.int64(counts[row.micro_batch])
        return replace(row, records=tuple(replace(r, data=tokens) if r.name == "tokens" else r for r in row.records))

    a = make_trace(tmp_path / "a.h5", edit=fewer, **uneven)
    b = make_trace(
        tmp_path / "b.h5", edit=losses(lambda loss, m: loss * counts[m] / sum(counts)), what=without, **uneven
    )
    for result in (diff(a, b), diff(b, a)):
        assert result.verdict is Verdict.SAME
        assert [note.id for note in result.notes if note.id == "loss.weighted"]


TOKENS = (10, 2)
# Of micro-batches of unequal length the short one has the large gradient: the two ways to average are far apart in size.
LOSSES = (3.0, 2.0)
GRADIENTS = tuple(size * np.random.default_rng(m).normal(size=64).astype(F32) for m, size in enumerate((1.0, 8.0)))


def step_of(path: Path, weights: tuple[float, float], divisor: float, *, micro: bool = True) -> Path:
    """One step of two micro-batches: what is differentiated is their mean loss times a weight, and the sum is divided."""
    rows, parts = [], [weight * gradient for weight, gradient in zip(weights, GRADIENTS, strict=True)]
    for m, (tokens, loss, weight, part) in enumerate(zip(TOKENS, LOSSES, weights, parts, strict=True)):
        rows.append(Row(Phase.BATCH, 1, m, (record("tokens", np.int64(tokens)),)))
        rows.append(Row(Phase.LOSS, 1, m, (record("loss", F32(weight * loss)),)))
        rows += [Row(Phase.GRAD, 1, m, (record("w", part.astype(F32)),))] if micro else []
    total = np.sum(parts, axis=0) / divisor
    rows.append(Row(Phase.GRAD, 1, WHOLE_STEP, (record("w", total.astype(F32)),)))
    writer = TraceWriter(path, env={}, declared={}, overwrite=True)
    writer.write_step(0, [Row(Phase.INIT, 0, WHOLE_STEP, (record("w", np.ones(64, F32)),))], {"model.dtype": "float32"})
    writer.write_step(1, rows)
    writer.finish()
    return path


BY_TOKENS = (10 / 12, 2 / 12)


def test_gradients_of_micro_batches_tell_a_weighted_loss_from_a_forgotten_division(tmp_path: Path) -> None:
    means, by_tokens = step_of(tmp_path / "a.h5", (1.0, 1.0), 2.0), step_of(tmp_path / "b.h5", BY_TOKENS, 1.0)
    for pair in ((means, by_tokens), (by_tokens, means)):
        result = diff(*pair)
        assert result.first is not None
        # The losses are the same ones; the gradients are averaged in two ways, which is what is wrong.
        assert (result.first.phase, result.first.micro_batch) == ("grad", None)
        assert result.causes[0].id == "grad.mean_of_means"


def test_a_factor_that_has_reached_the_gradient_is_found_in_the_loss(tmp_path: Path) -> None:
    summed, by_tokens = step_of(tmp_path / "a.h5", (1.0, 1.0), 1.0), step_of(tmp_path / "b.h5", BY_TOKENS, 1.0)
    for pair in ((summed, by_tokens), (by_tokens, summed)):
        result = diff(*pair)
        assert result.first is not None
        assert (result.first.phase, result.first.micro_batch) == ("loss", 0)


def test_without_gradients_of_micro_batches_those_of_other_sizes_bear_out_no_reduction(tmp_path: Path) -> None:
    means = step_of(tmp_path / "a.h5", (1.0, 1.0), 2.0, micro=False)
    result = diff(means, step_of(tmp_path / "b.h5", BY_TOKENS, 1.0))
    assert result.first is not None
    assert result.first.phase == "loss"


def steps_of(path: Path, divisor: float, sizes: tuple[float, ...], wrong: float = 1.0) -> Path:
    """A step for each size of the accumulated gradient; the mean losses of two micro-batches are recorded divided by `divisor`,
    those of the last step times `wrong`."""
    writer = TraceWriter(path, env={}, declared={}, overwrite=True)
    writer.write_step(0, [Row(Phase.INIT, 0, WHOLE_STEP, (record("w", np.ones(64, F32)),))], {"model.dtype": "float32"})
    for step, size in enumerate(sizes, start=1):
        rows = [
            Row(Phase.LOSS, step, m, (record("loss", F32(loss / divisor * (wrong if step == len(sizes) else 1.0))),))
            for m, loss in enumerate(LOSSES)
        ]
        rows.append(Row(Phase.GRAD, step, WHOLE_STEP, (record("w", (size * GRADIENTS[0]).astype(F32)),)))
        rows.append(Row(Phase.PARAM, step, WHOLE_STEP, (record("w", np.ones(64, F32)),)))
        writer.write_step(step, rows)
    writer.finish()
    return path


def found_in(folder: Path, a: tuple[float, ...], b: tuple[float, ...], wrong: float = 1.0) -> list[tuple[int, str]]:
    """Step and phase of the findings, which are the same in both directions."""
    means, halves = steps_of(folder / "a.h5", 1.0, a), steps_of(folder / "b.h5", 2.0, b, wrong)
    there, back = ([(f.step, f.phase) for f in diff(*pair).findings] for pair in ((means, halves), (halves, means)))
    assert there == back
    return there


def test_a_reduction_that_was_borne_out_holds_when_gradients_differ_for_another_reason(tmp_path: Path) -> None:
    assert found_in(tmp_path, (1.0, 1.0, 1.0), (1.0, 3.0, 1.0)) == [(2, "grad")]


def test_a_reduction_that_was_borne_out_does_not_excuse_losses_that_contradict_it(tmp_path: Path) -> None:
    assert found_in(tmp_path, (1.0, 1.0), (1.0, 1.0), wrong=1.2) == [(2, "loss")]


def test_a_reduction_that_was_never_borne_out_excuses_nothing(tmp_path: Path) -> None:
    assert found_in(tmp_path, (1.0, 1.0), (3.0, 3.0))[0] == (1, "loss")
