"""`loss.shift`: targets taken from another place than the next, told from token losses or from the reduced loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import F32, IGNORED
from tests.differ.causes.rows import compare, only_cause, shown
from tracer.positions import relevant_positions
from tracer.schema import Phase

ROWS, LENGTH, WORDS, MICRO_BATCHES = 3, 14, 40, 2
WORD = {0: "the token at its own place", 1: "the next token", 2: "the token two places on"}


def surprise(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    return np.asarray(np.log(np.exp(wide).sum(axis=-1, keepdims=True)) - wide)


def micro_batch(
    step: int, number: int, k: int, *, tokens: bool, limit: int, smooth: float
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """One micro-batch whose loss at t has the token at t + k as target; of one with `tokens` the losses of those too."""
    rng = np.random.default_rng(100 * step + number)
    ids = rng.integers(1, WORDS, size=(ROWS, LENGTH))
    labels = ids.copy()
    labels[:, : 2 + number] = IGNORED
    logits = rng.normal(size=(ROWS, LENGTH, WORDS)).astype(F32)
    scores = surprise(logits)
    each = np.zeros((ROWS, LENGTH))
    for t in range(LENGTH - max(k, 1)):
        target = ids[:, t + k]
        found = (1 - smooth) * np.take_along_axis(scores[:, t], target[:, None], -1)[:, 0] + smooth * scores[:, t].mean(
            -1
        )
        each[:, t + 1] = np.where(labels[:, t + k] != IGNORED, found, 0.0)
    places = relevant_positions(labels, None, limit)
    loss = {"loss": F32(each.sum() / (each != 0).sum())}
    return {
        (Phase.BATCH, step, number): {"input_ids": ids, "labels": labels, "tokens": np.int64((labels >= 0).sum())},
        (Phase.FORWARD, step, number): {"positions": places, "lm_head": logits[places[:, 0], places[:, 1]]},
        (Phase.LOSS, step, number): {**loss, "token_loss": each.astype(F32)} if tokens else loss,
    }


def run(
    k: int, *, tokens: bool = True, limit: int = 64, begins: int = 1, smooth: float = 0.0, batches: int = MICRO_BATCHES
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Two steps; the shift is `k` from step `begins` on."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for step in (1, 2):
        for number in range(batches):
            shift = k if step >= begins else 1
            rows |= micro_batch(step, number, shift, tokens=tokens, limit=limit, smooth=smooth)
    return rows


@pytest.mark.parametrize(("k", "begins"), [(2, 1), (2, 2), (0, 1)])
def test_another_target_is_told_from_the_token_losses(k: int, begins: int, tmp_path: Path) -> None:
    cause, mirrored = only_cause(tmp_path, run(1), run(k, begins=begins), "loss.shift")

    assert (cause.step, cause.side, cause.names) == (begins, "b", ("token_loss",))
    assert cause.summary.startswith(f"b's loss takes {WORD[k]} as target, a's the next token (tested on ")
    assert cause.parameters is not None
    assert (cause.parameters["shift_a"], cause.parameters["shift_b"]) == (1, k)
    assert mirrored.parameters is not None
    assert (mirrored.parameters["shift_a"], mirrored.parameters["shift_b"]) == (k, 1)


def test_a_few_recorded_positions_tell_the_target_too(tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(1, limit=12), run(2, limit=12), "loss.shift")

    assert cause.parameters is not None
    assert cause.parameters["tested"] < 2 * 12


def test_two_other_targets_have_no_side(tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(0), run(2), "loss.shift")

    assert cause.side is None


def test_the_reduced_loss_tells_the_target_where_all_logits_are_recorded(tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(1, tokens=False), run(2, tokens=False), "loss.shift")

    assert (cause.side, cause.names) == ("b", ("loss",))
    assert "tested on the losses of 4 micro-batches" in cause.summary


def test_the_reduced_loss_says_nothing_where_some_logits_are_not_recorded(tmp_path: Path) -> None:
    result = compare(tmp_path, run(1, tokens=False, limit=12), run(2, tokens=False, limit=12))

    assert result.findings
    assert shown(result) == []


def test_one_reduced_loss_is_too_few(tmp_path: Path) -> None:
    a, b = ({key: rows for key, rows in run(k, tokens=False, batches=1).items() if key[1] == 1} for k in (1, 2))

    result = compare(tmp_path, a, b)

    assert result.findings
    assert "loss.shift" not in shown(result)


@pytest.mark.parametrize("tokens", [True, False])
def test_smoothed_targets_are_no_shift(tokens: bool, tmp_path: Path) -> None:
    result = compare(tmp_path, run(1, tokens=tokens), run(1, tokens=tokens, smooth=0.1))

    assert result.findings
    assert "loss.shift" not in shown(result)


@pytest.mark.parametrize("tokens", [True, False])
def test_a_target_three_places_on_is_not_called_one_of_the_known(tokens: bool, tmp_path: Path) -> None:
    result = compare(tmp_path, run(1, tokens=tokens), run(3, tokens=tokens))

    assert result.findings
    assert "loss.shift" not in shown(result)


@pytest.mark.parametrize("k", [1, 2])
def test_the_same_targets_on_both_sides_are_no_finding(k: int, tmp_path: Path) -> None:
    result = compare(tmp_path, run(k), run(k))

    assert not result.findings
    assert shown(result) == []
