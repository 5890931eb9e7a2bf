"""`batch.positions`: each form planted, in both directions, beside positions that are none of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import IGNORED
from tests.differ.causes.rows import Rows, compare, only_cause, shown
from tracer.schema import Phase

LENGTH = 12
# Lengths of the documents packed into each row.
DOCUMENTS = ((5, 7), (4, 4, 4))
Positions = np.ndarray


def through(first: int = 0) -> Positions:
    return np.tile(np.arange(first, first + LENGTH), (2, 1))


def restarted(documents: Sequence[Sequence[int]] = DOCUMENTS, first: int = 0) -> Positions:
    return np.array([[first + t for n in row for t in range(n)] for row in documents])


def left_padded() -> np.ndarray:
    """A mask with three tokens of padding before the first row, none before the second."""
    mask = np.ones((2, LENGTH), np.int64)
    mask[0, :3] = 0
    return mask


def counted(mask: np.ndarray, filler: int = 1) -> Positions:
    """Positions that count what is attended to, as generation does."""
    return np.where(mask != 0, np.cumsum(mask, axis=1) - 1, filler)


def run(*positions: Positions, mask: np.ndarray | None = None, ids: int = 0) -> Rows:
    """One step with a micro-batch for each of some positions."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for i, given in enumerate(positions):
        tokens = np.random.default_rng(ids + i).integers(10, 90, size=given.shape)
        labels = np.where(np.arange(given.shape[1]) > 0, tokens, IGNORED)
        batch = {"input_ids": tokens, "labels": labels, "position_ids": given.astype(np.int64)}
        rows[Phase.BATCH, 1, i] = batch | ({} if mask is None else {"attention_mask": mask})
    return rows


def test_documents_whose_positions_begin_again_on_one_side(tmp_path: Path) -> None:
    cause, mirrored = only_cause(tmp_path, run(restarted()), run(through()), "batch.positions")

    at = [[0, 0, 5], [0, 1, 4], [0, 1, 8]]
    assert cause.parameters == {"form": "restart", "begins_a": 3, "begins_b": 0, "at": at}
    assert mirrored.parameters == {"form": "restart", "begins_a": 0, "begins_b": 3, "at": at}
    assert cause.names == ("position_ids",)
    assert cause.summary == (
        "a's positions begin again at 0 inside of rows (3 times, the first at column 5 of row 0); b counts through"
    )


def test_documents_that_begin_at_other_places(tmp_path: Path) -> None:
    b = restarted(((6, 6), (4, 4, 4)))

    cause, _ = only_cause(tmp_path, run(restarted()), run(b), "batch.positions")

    assert cause.parameters == {"form": "restart", "begins_a": 3, "begins_b": 3, "at": [[0, 0, 5], [0, 0, 6]]}


def test_one_micro_batch_of_several(tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(restarted(), restarted()), run(restarted(), through()), "batch.positions")

    assert cause.parameters is not None
    assert cause.parameters["at"] == [[1, 0, 5], [1, 1, 4], [1, 1, 8]]


@pytest.mark.parametrize("make", [through, restarted])
@pytest.mark.parametrize("offset", [1, 2])
def test_positions_that_are_off_by_a_constant(make: Callable[..., Positions], offset: int, tmp_path: Path) -> None:
    cause, mirrored = only_cause(tmp_path, run(make()), run(make(first=offset)), "batch.positions")

    assert cause.parameters == {"form": "offset", "offset": offset}
    assert mirrored.parameters == {"form": "offset", "offset": -offset}
    assert cause.summary == f"each position of b is a's plus {offset}"
    assert mirrored.summary == f"each position of a is b's plus {offset}"


@pytest.mark.parametrize("rows", [slice(0, 2), slice(0, 1)])
def test_padding_that_is_counted(rows: slice, tmp_path: Path) -> None:
    mask = left_padded()[rows]
    a, b = run(counted(mask), mask=mask), run(through()[rows], mask=mask)

    cause, mirrored = only_cause(tmp_path, a, b, "batch.positions")

    assert cause.parameters == {"form": "padding", "counted_by": "b", "most": 3}
    assert mirrored.parameters == {"form": "padding", "counted_by": "a", "most": 3}
    assert cause.summary == "b counts padding as positions, up to 3 in a row; a counts tokens only"


def test_positions_that_differ_at_padding_only(tmp_path: Path) -> None:
    mask = left_padded()

    cause, _ = only_cause(
        tmp_path, run(counted(mask), mask=mask), run(counted(mask, filler=0), mask=mask), "batch.positions"
    )

    assert cause.parameters == {"form": "unattended"}


def exchanged() -> Positions:
    found = restarted()
    found[0, [6, 7]] = found[0, [7, 6]]
    return found


def one_row_off() -> Positions:
    found = restarted()
    found[1] += 1
    return found


NEAR: dict[str, Positions] = {
    "two exchanged": exchanged(),
    "reversed": through()[:, ::-1],
    "one constant": np.zeros((2, LENGTH), np.int64),
    "stretched": 2 * through(),
    "off by a constant in one row": one_row_off(),
    "begun again at another number": np.where(restarted() < through(), restarted() + 1, restarted()),
}


@pytest.mark.parametrize("name", NEAR)
def test_positions_of_another_kind_have_no_cause(name: str, tmp_path: Path) -> None:
    result = compare(tmp_path, run(restarted()), run(NEAR[name]))

    assert result.first is not None
    assert result.first.name == "position_ids"
    assert "batch.positions" not in shown(result)


def test_padding_counted_and_an_offset_are_not_one_form(tmp_path: Path) -> None:
    mask = left_padded()

    assert not shown(compare(tmp_path, run(counted(mask), mask=mask), run(through(first=2), mask=mask)))


def test_other_ids_come_first(tmp_path: Path) -> None:
    assert "batch.positions" not in shown(compare(tmp_path, run(restarted()), run(through(), ids=7)))


def test_equal_positions_are_no_divergence(tmp_path: Path) -> None:
    assert compare(tmp_path, run(restarted()), run(restarted())).findings == ()
