"""Which positions of a micro-batch are recorded: a property of labels and mask, not of padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from tracer.positions import IGNORED, relevant_positions

Rows = list[list[bool]]

# Rows of supervised or not, one flag a token; column 0 is made unsupervised as batches have it.
ROWS = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=5)


def batch(rows: Rows, padding: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Labels and attention mask of rows of unequal length, padded on the right to the longest and `padding` more."""
    length = max(map(len, rows)) + padding
    labels, mask = np.full((len(rows), length), IGNORED), np.zeros((len(rows), length), int)
    for i, row in enumerate(rows):
        labels[i, : len(row)] = [7 if flag and t else IGNORED for t, flag in enumerate(row)]
        mask[i, : len(row)] = 1
    return labels, mask


@given(ROWS, st.integers(0, 4))
def test_a_position_is_kept_if_and_only_if_it_is_no_padding_and_a_later_label_is_supervised(
    rows: Rows, padding: int
) -> None:
    labels, mask = batch(rows, padding)
    expected = [
        [b, t]
        for b, row in enumerate(labels)
        for t in range(len(row))
        if mask[b, t] and any(label != IGNORED for label in row[t + 1 :])
    ]
    assert relevant_positions(labels, mask, 10**6).tolist() == expected


@given(ROWS, st.integers(0, 4), st.integers(0, 4), st.integers(1, 12))
def test_positions_do_not_depend_on_the_padding_nor_on_whether_a_mask_was_given(
    rows: Rows, one: int, other: int, limit: int
) -> None:
    labels, mask = batch(rows, one)
    wider, _ = batch(rows, other)
    np.testing.assert_array_equal(relevant_positions(labels, mask, limit), relevant_positions(wider, None, limit))


@given(ROWS, st.integers(0, 3), st.integers(1, 12))
def test_a_long_batch_is_thinned_out_evenly(rows: Rows, padding: int, limit: int) -> None:
    labels, mask = batch(rows, padding)
    everything = relevant_positions(labels, mask, 10**6)
    kept = relevant_positions(labels, mask, limit)
    assert kept.shape == (min(limit, len(everything)), 2)
    assert kept.dtype == np.int64
    at = [everything.tolist().index(pair) for pair in kept.tolist()]
    assert at == sorted(set(at))
    if len(at) > 1:
        assert (at[0], at[-1]) == (0, len(everything) - 1)
        assert max(np.diff(at)) - min(np.diff(at)) <= 1


def test_left_padding_is_not_recorded() -> None:
    labels = np.array([[IGNORED, IGNORED, IGNORED, 5, 6]])
    mask = np.array([[0, 0, 1, 1, 1]])
    assert relevant_positions(labels, mask, 64).tolist() == [[0, 2], [0, 3]]


def test_a_mask_of_another_shape_is_passed_over_and_an_empty_batch_has_no_positions() -> None:
    labels = np.array([[IGNORED, 5, 6]])
    assert len(relevant_positions(labels, np.zeros((1, 1, 3, 3)), 64)) == 2
    assert relevant_positions(np.zeros((0, 4), int), None, 64).shape == (0, 2)
    assert relevant_positions(np.zeros((2, 0), int), None, 64).shape == (0, 2)
