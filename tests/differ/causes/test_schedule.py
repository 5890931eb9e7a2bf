"""`schedule.lr`: each way in which two schedules differ is planted, beside what looks like it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.differ.causes.rows import Rows, compare, only_cause, shown
from tracer.schema import Phase

STEPS = 12
WARMUP = 4
LR = 1e-3
NAME = "group0.lr"

Schedule = Callable[[int], float]


def cosine(t: int) -> float:
    """Linear warm-up, then a cosine; t counts from 1."""
    return LR * t / WARMUP if t < WARMUP else LR * 0.5 * (1 + np.cos(np.pi * (t - WARMUP) / 40))


def schedule(*of: Schedule) -> Rows:
    return {
        (Phase.HPARAMS, t): {f"group{i}.lr": np.float64(lr(t)) for i, lr in enumerate(of)} for t in range(1, STEPS + 1)
    }


def parameters(tmp_path: Path, a: Schedule, b: Schedule) -> tuple[Any, Any, str | None, int | None]:
    cause, mirrored = only_cause(tmp_path, schedule(a), schedule(b), "schedule.lr")
    assert cause.names == (NAME,)
    return cause.parameters, mirrored.parameters, cause.side, cause.step


@pytest.mark.parametrize("ratio", [1.0001, 0.1])
def test_a_constant_ratio(ratio: float, tmp_path: Path) -> None:
    found, mirrored, side, step = parameters(tmp_path, cosine, lambda t: ratio * cosine(t))

    assert found == {"form": "ratio", "ratio": pytest.approx(ratio, rel=1e-6)}
    assert mirrored["ratio"] == pytest.approx(1 / ratio, rel=1e-6)
    assert (side, step) == (None, 1)


def test_a_ratio_that_begins_late(tmp_path: Path) -> None:
    found, _, _, step = parameters(tmp_path, cosine, lambda t: cosine(t) * (0.5 if t >= 9 else 1))

    assert found == {"form": "ratio", "ratio": 0.5, "from_step": 9}
    assert step == 9


@pytest.mark.parametrize("k", [1, -1, 3])
def test_an_offset_in_steps(k: int, tmp_path: Path) -> None:
    found, mirrored, _, _ = parameters(tmp_path, cosine, lambda t: cosine(t + k))

    assert found == {"form": "offset", "steps": k}
    assert mirrored == {"form": "offset", "steps": -k}


@pytest.mark.parametrize("k", [1, -2])
def test_an_offset_that_begins_late(k: int, tmp_path: Path) -> None:
    found, mirrored, _, step = parameters(tmp_path, cosine, lambda t: cosine(t + k if t >= 6 else t))

    assert found == {"form": "offset", "steps": k, "from_step": 6}
    assert mirrored == {"form": "offset", "steps": -k, "from_step": 6}
    assert step == 6


def test_a_rate_that_stays_where_it_is_from_a_step_on(tmp_path: Path) -> None:
    found, _, side, step = parameters(tmp_path, cosine, lambda t: cosine(min(t, 7)))

    assert found == {"form": "constant", "value": pytest.approx(cosine(7), rel=1e-6), "from_step": 8}
    assert (side, step) == ("b", 8)


@pytest.mark.parametrize("k", [2, 4])
def test_a_schedule_that_advances_several_times_a_step(k: int, tmp_path: Path) -> None:
    found, mirrored, side, _ = parameters(tmp_path, cosine, lambda t: cosine(1 + k * (t - 1)))

    assert found == mirrored == {"form": "advanced", "times": k}
    assert side == "b"


def test_a_schedule_that_counts_from_one_and_advances_twice(tmp_path: Path) -> None:
    found, *_ = parameters(tmp_path, cosine, lambda t: cosine(2 * t))

    assert found == {"form": "advanced", "times": 2}


def test_a_schedule_that_never_advances(tmp_path: Path) -> None:
    found, _, side, _ = parameters(tmp_path, cosine, lambda t: cosine(1))

    assert (found, side) == ({"form": "advanced", "times": 0}, "b")


def test_a_warm_up_that_is_left_out(tmp_path: Path) -> None:
    found, mirrored, side, _ = parameters(tmp_path, cosine, lambda t: max(cosine(t), LR) if t < WARMUP else cosine(t))

    assert found == mirrored == {"form": "no_warmup", "steps": WARMUP, "peak": LR}
    assert side == "b"


def constant_after(warmup: int) -> Schedule:
    """Linear warm-up from 0, then the peak."""
    return lambda t: LR * min(1.0, (t - 1) / warmup)


@pytest.mark.parametrize("warmup", [1, 2, WARMUP, STEPS - 1])
def test_a_warm_up_to_a_constant_rate_is_left_out(warmup: int, tmp_path: Path) -> None:
    found, mirrored, side, step = parameters(tmp_path, constant_after(warmup), lambda t: LR)

    assert found == mirrored == {"form": "no_warmup", "steps": warmup + 1, "peak": LR}
    assert (side, step) == ("b", 1)


def test_a_warm_up_that_is_two_steps_ahead_is_no_missing_one(tmp_path: Path) -> None:
    found, *_ = parameters(tmp_path, constant_after(WARMUP), lambda t: constant_after(WARMUP)(t + 2))

    assert found == {"form": "offset", "steps": 2}


def test_a_constant_rate_at_another_peak_is_no_missing_warm_up(tmp_path: Path) -> None:
    found, *_ = parameters(tmp_path, constant_after(2), lambda t: 3e-4)

    assert found == {"form": "constant", "value": 3e-4}


def test_a_constant_rate_against_a_schedule(tmp_path: Path) -> None:
    found, _, side, _ = parameters(tmp_path, cosine, lambda t: 3e-4)

    assert (found, side) == ({"form": "constant", "value": 3e-4}, "b")


def test_groups_with_the_same_difference_share_a_cause(tmp_path: Path) -> None:
    a, b = schedule(cosine, cosine), schedule(lambda t: 2 * cosine(t), lambda t: 2 * cosine(t))

    cause, _ = only_cause(tmp_path, a, b, "schedule.lr")

    assert cause.names == ("group0.lr", "group1.lr")


def test_one_group_of_two_is_named(tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, schedule(cosine, cosine), schedule(cosine, lambda t: 2 * cosine(t)), "schedule.lr")

    assert cause.names == ("group1.lr",)


def test_another_kind_of_decay_is_not_explained(tmp_path: Path) -> None:
    result = compare(tmp_path, schedule(cosine), schedule(lambda t: LR / (1 + t * t / 7)))

    assert result.first is not None
    assert shown(result) == []


def test_a_rate_that_float32_rounds_is_the_same(tmp_path: Path) -> None:
    result = compare(tmp_path, schedule(cosine), schedule(lambda t: float(np.float32(cosine(t)))))

    assert (result.verdict.value, result.causes) == ("same", ())


def test_another_decay_of_the_weights_is_no_schedule(tmp_path: Path) -> None:
    a, b = ({(Phase.HPARAMS, 1): {NAME: np.float64(LR), "group0.weight_decay": np.float64(w)}} for w in (0.1, 0.2))

    assert "schedule.lr" not in shown(compare(tmp_path, a, b))
