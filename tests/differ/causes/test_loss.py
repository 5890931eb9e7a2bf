"""Loss causes: another denominator or factor, and a loss computed in a short dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from differ.causes.grid import round_to
from differ.result import Verdict
from tests.builders import F32, IGNORED
from tests.differ.causes.plant import Edit, causes, edited, ids, mirrored, with_data
from tests.differ.conftest import Compare
from tracer.schema import Phase, Record, Row


@pytest.mark.parametrize(("factor", "matches"), [(2.0, "the number of micro-batches (2)"), (1.3, "")])
def test_one_factor_in_losses_and_gradients_is_named(factor: float, matches: str, compare: Compare) -> None:
    result = compare(b={"loss_factor": factor})

    (cause,) = causes(result, "loss.reduction")
    assert (cause.step, cause.phase) == (1, "loss")
    assert cause.parameters is not None
    assert cause.parameters["factor"] == pytest.approx(factor, rel=1e-5)
    assert matches in cause.summary
    assert ids(result) == ["loss.reduction"]


def test_a_single_loss_is_borne_out_by_the_gradients(compare: Compare) -> None:
    result = compare(b={"loss_factor": 1.7}, micro_batches=1)

    (cause,) = causes(result, "loss.reduction")
    assert cause.parameters is not None
    assert cause.parameters["gradients"] is True


def test_a_single_loss_whose_gradients_agree_is_no_factor(compare: Compare) -> None:
    result = compare(b={"edit": edited(Phase.LOSS, lambda one: with_data(one, one.data * F32(1.7)))}, micro_batches=1)

    assert not causes(result, "loss.reduction")


@pytest.mark.parametrize(
    ("words", "factor"),
    [
        ("does not divide by the supervised positions (a sum)", lambda n: n),
        ("divides by all positions", lambda n: n / 12),
        ("divides by the rows of the batch", lambda n: n / 2),
    ],
)
def test_another_denominator_is_named_where_lengths_differ(
    words: str, factor, compare: Compare, tmp_path: Path
) -> None:
    result = compare(a={"edit": _unequal(lambda n: 1.0)}, b={"edit": _unequal(factor)})

    (cause,) = causes(result, "loss.reduction")
    assert cause.side == "b"
    assert cause.parameters is not None
    assert cause.parameters["denominator"] == words
    assert cause.summary.startswith(f"b {words}")
    assert causes(mirrored(tmp_path), "loss.reduction")[0].side == "a"


def test_the_share_of_the_step_is_the_same_loss_where_the_gradients_agree(compare: Compare) -> None:
    result = compare(a={"edit": _unequal(lambda n: 1.0)}, b={"edit": _unequal(lambda n: n / 15)})

    assert result.verdict is Verdict.SAME
    (note,) = [note for note in result.notes if note.id == "loss.weighted"]
    assert "b each micro-batch's summed loss divided by all tokens of the step" in note.summary


def test_a_sum_without_gradients_to_bear_it_out_is_told_by_its_denominator(compare: Compare) -> None:
    summed = edited(Phase.LOSS, lambda one: with_data(one, one.data * F32(10)))

    result = compare(b={"edit": summed}, what=frozenset({Phase.INIT, Phase.BATCH, Phase.LOSS}), micro_batches=1)

    (cause,) = causes(result, "loss.reduction")
    assert cause.summary == "b does not divide by the supervised positions (a sum); a by those of each micro-batch"


def test_losses_of_other_batches_are_no_reduction(compare: Compare) -> None:
    assert not causes(compare("batch_order"), "loss.reduction")


@pytest.mark.parametrize(("dtype", "at"), [("bfloat16", 1), ("bfloat16", 2), ("float16", 1)])
def test_a_loss_on_the_grid_of_a_short_dtype_is_named(dtype: str, at: int, compare: Compare) -> None:
    result = compare(
        b={"edit": edited(Phase.LOSS, lambda one: _rounded(one, dtype))}, only_steps=frozenset({0, *range(at, 4)})
    )

    (cause,) = causes(result, "loss.precision")
    assert (cause.phase, cause.side, cause.step) == ("loss", "b", at)
    assert cause.parameters == {"dtype": dtype}
    assert ids(result) == ["loss.precision"]


def test_a_loss_that_gets_short_at_a_later_step_is_named_there(compare: Compare) -> None:
    def late(row: Row) -> Row | None:
        return edited(Phase.LOSS, lambda one: _rounded(one, "bfloat16"))(row) if row.step >= 2 else row

    (cause,) = causes(compare(b={"edit": late}), "loss.precision")

    assert (cause.side, cause.step) == ("b", 2)


def test_a_loss_that_is_off_by_a_little_is_not_on_a_grid(compare: Compare) -> None:
    result = compare(b={"edit": edited(Phase.LOSS, lambda one: with_data(one, one.data * F32(1.003)))})

    assert not causes(result, "loss.precision")


def test_losses_on_the_grid_on_both_sides_have_no_cause(compare: Compare) -> None:
    assert compare(edit=edited(Phase.LOSS, lambda one: _rounded(one, "bfloat16")), noise=0.0).causes == ()


def _rounded(one: Record, dtype: str) -> Record:
    return with_data(one, round_to(np.asarray(one.data, np.float64), dtype))


def _unequal(factor) -> Edit:
    """Micro-batches with 10 and 5 supervised positions, and losses times a factor of that count."""
    counts = (10, 5)

    def change(row: Row, one: Record) -> Record:
        if one.name == "loss":
            return with_data(one, one.data * F32(factor(counts[row.micro_batch])))
        if one.name == "tokens":
            return Record(one.name, np.asarray(np.int64(counts[row.micro_batch])), one.dtype, ())
        if one.name == "labels" and row.micro_batch == 1:
            labels = np.array(one.data)
            labels[1] = IGNORED
            return Record(one.name, labels, one.dtype, labels.shape)
        return one

    def edit(row: Row) -> Row | None:
        if row.phase not in (Phase.LOSS, Phase.BATCH):
            return row
        return Row(row.phase, row.step, row.micro_batch, tuple(change(row, one) for one in row.records))

    return edit


def test_losses_in_a_short_dtype_that_are_within_tolerance_are_a_note(compare: Compare, tmp_path: Path) -> None:
    from differ import DiffOptions
    from differ.policy import load_policy

    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nphase = "loss"\nbase = 0.1\n')

    def rounded(one: Record) -> Record:
        return with_data(one, np.reshape(_rounded(one, "bfloat16").data, np.shape(one.data)))

    result = compare(
        b={"edit": edited(Phase.LOSS, rounded)},
        options=DiffOptions(policy=load_policy(policy)),
    )

    assert result.verdict is Verdict.SAME
    (note,) = [note for note in result.notes if note.id == "loss.precision"]
    assert (note.side, note.parameters) == ("b", {"dtype": "bfloat16"})
