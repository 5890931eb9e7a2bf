"""Causes of a difference between batches: each planted early and late, in one micro-batch and in all, beside look-alikes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import IGNORED
from tests.differ.causes.rows import Rows, compare, counted, only_cause, sentences, shown
from tracer.schema import Phase

STEPS = (1, 2, 3)
MICRO = (0, 1)
Batch = dict[str, Any]
Change = Callable[[Batch], Batch]


def run(
    change: Change = lambda batch: batch,
    *,
    steps: tuple[int, ...] = STEPS,
    micro: tuple[int, ...] = MICRO,
    make: Callable[..., Batch] = sentences,
    **settings: Any,
) -> Rows:
    """Three steps of two micro-batches; `change` is applied at some steps and micro-batches."""
    rows = {}
    for step in STEPS:
        for m in MICRO:
            batch = make(seed=10 * step + m, **settings)
            rows[Phase.BATCH, step, m] = change(batch) if step in steps and m in micro else batch
    return rows


def shifted(k: int, fill: int = 1) -> Change:
    """Ids and labels moved right by k; what goes in is BOS, unsupervised."""

    def change(batch: Batch) -> Batch:
        ids, labels = np.roll(batch["input_ids"], k, axis=1), np.roll(batch["labels"], k, axis=1)
        ids[:, :k], labels[:, :k] = fill, IGNORED
        return counted({"input_ids": ids, "labels": labels})

    return change


# batch.shift


@pytest.mark.parametrize("steps", [(1, 2, 3), (2,)])
@pytest.mark.parametrize("micro", [(0, 1), (1,)])
def test_a_doubled_bos_is_named(steps: tuple[int, ...], micro: tuple[int, ...], tmp_path: Path) -> None:
    b = run(shifted(1), steps=steps, micro=micro)

    if micro == (0, 1):
        cause, mirrored = only_cause(tmp_path, run(), b, "batch.shift")

        assert (cause.step, cause.side) == (steps[0], "b")
        assert cause.parameters == {"shift": 1, "doubled_bos": True}
        assert mirrored.parameters == {"shift": -1, "doubled_bos": True}
        assert cause.names == ("input_ids", "labels", "tokens")
    else:
        cause, _ = only_cause(tmp_path, run(), b, "batch.shift")

        assert cause.parameters is not None
        assert cause.parameters["shift"] == 1


def test_a_row_that_grows_by_its_second_bos_is_shifted(tmp_path: Path) -> None:
    def longer(batch: Batch) -> Batch:
        ids, labels = (
            np.pad(batch[key], ((0, 0), (1, 0)), constant_values=value)
            for key, value in (("input_ids", 1), ("labels", IGNORED))
        )
        return counted({"input_ids": ids, "labels": labels})

    cause, _ = only_cause(tmp_path, run(), run(longer), "batch.shift")

    assert cause.parameters == {"shift": 1, "doubled_bos": True}
    assert cause.names == ("input_ids", "labels")


def test_ids_that_are_shifted_by_three(tmp_path: Path) -> None:
    cause, mirrored = only_cause(tmp_path, run(), run(shifted(3, fill=7)), "batch.shift")

    assert cause.parameters == {"shift": 3, "doubled_bos": False}
    assert mirrored.parameters == {"shift": -3, "doubled_bos": False}
    assert cause.summary == "b's ids are shifted right by 3 positions"
    assert mirrored.summary == "b's ids are shifted left by 3 positions"
    assert cause.side is None


def test_labels_alone_that_are_shifted(tmp_path: Path) -> None:
    def change(batch: Batch) -> Batch:
        labels = np.roll(batch["labels"], -1, axis=1)
        labels[:, -1] = IGNORED
        return counted({**batch, "labels": labels})

    cause, mirrored = only_cause(tmp_path, run(), run(change), "batch.shift")

    assert (cause.names, cause.parameters) == (("labels",), {"shift": -1, "doubled_bos": False})
    assert cause.summary == "b's labels are shifted left by 1 position"
    assert mirrored.summary == "b's labels are shifted right by 1 position"


def test_other_ids_are_no_shift(tmp_path: Path) -> None:
    result = compare(
        tmp_path, run(), run(lambda batch: counted({**batch, "input_ids": batch["input_ids"][:, ::-1].copy()}))
    )

    assert shown(result) == []


# batch.padding


@pytest.mark.parametrize("by", [1, 20])
@pytest.mark.parametrize("steps", [(1, 2, 3), (3,)])
def test_wider_padding_is_named_with_both_widths(by: int, steps: tuple[int, ...], tmp_path: Path) -> None:
    def change(batch: Batch) -> Batch:
        ids = np.pad(batch["input_ids"], ((0, 0), (0, by)))
        return {
            **batch,
            "input_ids": ids,
            "labels": np.pad(batch["labels"], ((0, 0), (0, by)), constant_values=IGNORED),
        }

    cause, mirrored = only_cause(tmp_path, run(), run(change, steps=steps), "batch.padding")

    assert cause.step == steps[0]
    assert cause.names == ("input_ids", "labels")
    assert cause.parameters is not None
    assert mirrored.parameters is not None
    assert (cause.parameters["width_a"], cause.parameters["width_b"]) == (12, 12 + by)
    assert (mirrored.parameters["width_a"], mirrored.parameters["width_b"]) == (12 + by, 12)


def test_padding_with_another_id_is_named_with_both(tmp_path: Path) -> None:
    a, b = run(width=14), run(width=14, pad=99)

    cause, _ = only_cause(tmp_path, a, b, "batch.padding")

    assert cause.parameters is not None
    assert (cause.parameters["id_a"], cause.parameters["id_b"]) == (0, 99)
    assert cause.summary == "a pads with id 0, b with 99; without padding the rows agree"


@pytest.mark.parametrize("masked", [True, False])
def test_padding_on_the_left_is_named(masked: bool, tmp_path: Path) -> None:
    def right(batch: Batch) -> Batch:
        return {**batch, "attention_mask": (batch["input_ids"] != 0).astype(np.int64)} if masked else batch

    def left(batch: Batch) -> Batch:
        turned = {key: value.copy() for key, value in right(batch).items()}
        for key in set(turned) - {"tokens"}:
            for i, row in enumerate(batch["input_ids"]):
                turned[key][i] = np.roll(turned[key][i], int((row == 0).sum()))
        return turned

    cause, _ = only_cause(tmp_path, run(right, width=16), run(left, width=16), "batch.padding")

    assert cause.parameters is not None
    assert (cause.parameters["where_a"], cause.parameters["where_b"]) == ("right", "left")
    assert cause.names == (("attention_mask",) if masked else ()) + ("input_ids", "labels")


def test_padding_that_is_supervised_is_no_padding(tmp_path: Path) -> None:
    def change(batch: Batch) -> Batch:
        ids = np.pad(batch["input_ids"], ((0, 0), (0, 2)))
        return counted({"input_ids": ids, "labels": np.pad(batch["labels"], ((0, 0), (0, 2)))})

    assert "batch.padding" not in shown(compare(tmp_path, run(), run(change)))


# batch.mask


def unsupervised(which: int | slice) -> Change:
    """Without some of each row's supervised positions."""

    def change(batch: Batch) -> Batch:
        labels = batch["labels"].copy()
        for row in labels:
            row[np.flatnonzero(row != IGNORED)[which]] = IGNORED
        return counted({**batch, "labels": labels})

    return change


@pytest.mark.parametrize(
    ("which", "where"), [(0, "first"), (-1, "last"), (slice(2, 4), "elsewhere"), (slice(None), "all")]
)
def test_positions_that_one_side_does_not_supervise_are_counted(which: int | slice, where: str, tmp_path: Path) -> None:
    cause, mirrored = only_cause(tmp_path, run(), run(unsupervised(which)), "batch.mask")

    assert cause.parameters is not None
    assert mirrored.parameters is not None
    assert cause.names == ("labels", "tokens")
    assert cause.parameters["where"] == where
    assert cause.parameters["only_b"] == mirrored.parameters["only_a"] == 0
    assert cause.parameters["only_a"] == mirrored.parameters["only_b"] > 0
    assert cause.parameters["positions"][0][:2] == [0, 0]


def test_one_position_at_a_late_step(tmp_path: Path) -> None:
    def change(batch: Batch) -> Batch:
        labels = batch["labels"].copy()
        labels[2, 5] = IGNORED
        return counted({**batch, "labels": labels})

    cause, _ = only_cause(tmp_path, run(), run(change, steps=(3,), micro=(1,)), "batch.mask")

    assert cause.step == 3
    assert cause.summary == "same ids, 1 position supervised in a only"
    assert cause.parameters is not None
    assert cause.parameters["positions"] == [[1, 2, 5]]


def test_an_attention_mask_is_named_as_such(tmp_path: Path) -> None:
    def masked(extra: int) -> Change:
        def change(batch: Batch) -> Batch:
            mask = (batch["input_ids"] != 0).astype(np.int64)
            mask[:, :extra] = 0
            return {**batch, "attention_mask": mask}

        return change

    cause, _ = only_cause(tmp_path, run(masked(0)), run(masked(1)), "batch.mask")

    assert cause.names == ("attention_mask",)
    assert cause.summary == "same ids, 8 positions attended to in a only (the first of their rows)"


def test_labels_of_other_tokens_are_no_mask(tmp_path: Path) -> None:
    def change(batch: Batch) -> Batch:
        labels = batch["labels"]
        return {**batch, "labels": np.where(labels == IGNORED, IGNORED, (labels * 7) % 90 + 1)}

    assert "batch.mask" not in shown(compare(tmp_path, run(), run(change)))


# batch.order


@pytest.mark.parametrize("steps", [(1, 2, 3), (2,)])
def test_rows_in_another_order_within_a_micro_batch(steps: tuple[int, ...], tmp_path: Path) -> None:
    def change(batch: Batch) -> Batch:
        return {**batch, "input_ids": batch["input_ids"][::-1].copy(), "labels": batch["labels"][::-1].copy()}

    cause, _ = only_cause(tmp_path, run(), run(change, steps=steps), "batch.order")

    assert cause.step == steps[0]
    assert cause.parameters == {"scope": "micro_batch", "rows": 8}
    assert cause.names == ("input_ids", "labels")


def test_micro_batches_in_another_order_within_a_step(tmp_path: Path) -> None:
    a = run()
    b = {key: a[key[0], key[1], 1 - key[2]] for key in a}

    cause, _ = only_cause(tmp_path, a, b, "batch.order")

    assert cause.parameters == {"scope": "step", "rows": 8}


def test_steps_in_another_order(tmp_path: Path) -> None:
    a = run()
    b = {key: a[key[0], 4 - key[1], key[2]] for key in a}

    cause, _ = only_cause(tmp_path, a, b, "batch.order")

    assert cause.parameters == {"scope": "run", "rows": 24}
    assert cause.summary == "the same 24 rows in another order, over the steps recorded"


def test_rows_in_another_number_of_micro_batches(tmp_path: Path) -> None:
    a = run()
    b = {}
    for step in STEPS:
        halves = [a[Phase.BATCH, step, m] for m in MICRO]
        b[Phase.BATCH, step, 0] = counted(
            {key: np.concatenate([h[key] for h in halves]) for key in ("input_ids", "labels")}
        )

    cause, _ = only_cause(tmp_path, a, b, "batch.order")

    assert cause.parameters == {"scope": "step", "rows": 8, "micro_batches_a": 2, "micro_batches_b": 1}
    assert cause.names == ("input_ids", "labels", "tokens")


def test_other_rows_are_no_other_order(tmp_path: Path) -> None:
    other = {key: sentences(seed=77 + i) for i, key in enumerate(run())}

    result = compare(tmp_path, run(), other)

    assert result.first is not None
    assert shown(result) == []


def test_equal_batches_have_no_cause(tmp_path: Path) -> None:
    result = compare(tmp_path, run(), run())

    assert (result.verdict.value, result.causes) == ("same", ())
