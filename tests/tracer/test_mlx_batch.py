"""From a loss function's arguments to `input_ids`, `labels`, `tokens`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tracer.backends.mlx_batch import Argument, Count, map_batch

ROWS = np.array([[5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14]])
LENGTHS = np.array([[2, 4], [0, 6]])


def mapped(returned: int | None = None, *, certain: bool = True, **arguments: Any) -> dict[str, Any]:
    """Records of a micro-batch whose loss function has these parameters, as lists."""
    given = [
        Argument(str(i), name, np.asarray(value), str(np.asarray(value).dtype))
        for i, (name, value) in enumerate(arguments.items())
    ]
    count = None if returned is None else Count(returned, certain)
    return {named.name: np.asarray(named.value).tolist() for named in map_batch(given, returned=count)}


def test_lengths_supervise_from_offset_to_length_with_both_ends() -> None:
    records = mapped(batch=ROWS, lengths=LENGTHS)
    assert records["labels"] == [[-100, -100, 7, 8, 0, -100], [-100, 10, 11, 12, 13, 14]]
    assert records["tokens"] == 8
    assert set(records) == {"input_ids", "labels", "tokens"}


def test_the_returned_count_decides_whether_the_end_is_supervised() -> None:
    assert mapped(7, batch=ROWS, lengths=LENGTHS)["labels"][0] == [-100, -100, 7, 8, -100, -100]
    assert mapped(8, batch=ROWS, lengths=LENGTHS)["labels"][0] == [-100, -100, 7, 8, 0, -100]


def test_labels_that_contradict_the_returned_count_are_not_recorded() -> None:
    records = mapped(3, batch=ROWS, lengths=LENGTHS)
    assert "labels" not in records
    assert records["tokens"] == 3
    assert records["args.1"] == LENGTHS.tolist()
    assert records["input_ids"] == ROWS.tolist()


def test_a_float_beside_the_loss_that_fits_nothing_is_no_count() -> None:
    assert mapped(1, certain=False, batch=ROWS, lengths=LENGTHS)["tokens"] == 8
    assert mapped(7, certain=False, batch=ROWS, lengths=LENGTHS)["tokens"] == 7


@pytest.mark.parametrize("names", [("x", "y"), ("inputs", "targets"), ("X", "Y"), ("a", "b")])
def test_shifted_targets_are_joined_to_their_inputs(names: tuple[str, str]) -> None:
    records = mapped(**dict(zip(names, (ROWS[:, :-1], ROWS[:, 1:]), strict=True)))
    assert records["input_ids"] == ROWS.tolist()
    assert records["labels"] == [[-100, 6, 7, 8, 0, 0], [-100, 10, 11, 12, 13, 14]]
    assert records["tokens"] == 10


def test_two_unknown_arrays_that_are_not_shifted_are_kept_as_they_are() -> None:
    records = mapped(a=ROWS[:, :-1], b=ROWS[:, :-1])
    assert set(records) == {"args.0", "args.1"}


def test_labels_of_the_ids_own_width_are_unshifted_unless_the_numbers_say_otherwise() -> None:
    labels = np.where(ROWS == 0, -100, ROWS)
    unshifted = mapped(input_ids=ROWS, labels=labels)
    assert unshifted["labels"] == [[-100, 6, 7, 8, -100, -100], [-100, 10, 11, 12, 13, 14]]
    shifted = mapped(input_ids=ROWS[:, :-1], labels=labels[:, 1:])
    assert shifted["labels"] == unshifted["labels"]
    assert shifted["input_ids"] == ROWS.tolist()


def test_a_last_target_that_no_row_supervises_adds_no_column() -> None:
    targets = ROWS[:, 1:].copy()
    targets[:, -1] = -100
    records = mapped(x=ROWS[:, :-1], y=targets)
    assert records["input_ids"] == ROWS[:, :-1].tolist()
    assert records["labels"] == [[-100, 6, 7, 8, 0], [-100, 10, 11, 12, 13]]


@pytest.mark.parametrize("first", [0, 1])
def test_a_mask_over_tokens_or_over_targets_takes_positions_away(first: int) -> None:
    mask = (ROWS != 0)[:, first:].astype(np.float32)
    records = mapped(batch=ROWS, mask=mask)
    assert records["labels"] == [[-100, 6, 7, 8, -100, -100], [-100, 10, 11, 12, 13, 14]]
    assert "args.1" not in records


def test_weights_other_than_0_and_1_are_kept_beside_the_labels() -> None:
    weights = np.full(ROWS[:, 1:].shape, 0.5, np.float32)
    records = mapped(tokens=ROWS, weights=weights)
    assert records["args.1"] == weights.tolist()
    assert records["tokens"] == 10


def test_without_a_sign_of_what_is_supervised_there_are_no_labels() -> None:
    assert set(mapped(batch=ROWS)) == {"input_ids"}
    assert mapped(10, batch=ROWS)["labels"][1] == [-100, 10, 11, 12, 13, 14]
    assert set(mapped(9, batch=ROWS)) == {"input_ids", "tokens"}


def test_arguments_that_are_no_tokens_are_kept_as_they_are() -> None:
    records = mapped(x=np.ones((2, 3), np.float32), y=np.array([0, 1]))
    assert set(records) == {"args.0", "args.1"}


def test_attention_mask_and_positions_keep_their_names() -> None:
    records = mapped(input_ids=ROWS, labels=ROWS, attention_mask=(ROWS != 0).astype(np.int32), position_ids=ROWS)
    assert set(records) == {"input_ids", "labels", "attention_mask", "position_ids", "tokens"}


def test_a_shape_that_fits_nothing_leaves_the_labels_out() -> None:
    records = mapped(inputs=ROWS, targets=ROWS[:, :3])
    assert set(records) == {"input_ids", "args.1"}
    records = mapped(batch=ROWS, lengths=np.array([1, 2, 3]))
    assert set(records) == {"input_ids", "args.1"}
