"""The twin's starting point is one rounding unit away, and only that."""

from __future__ import annotations

import numpy as np
import pytest

from tracer.dtypes import EPSILON, float32_to_bf16, to_float64
from tracer.perturb import Perturbation, nudge


@pytest.mark.parametrize("dtype", sorted(EPSILON))
def test_each_element_moves_by_one_unit_and_zeros_stay(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(50, 3))
    values[0] = 0.0
    stored = float32_to_bf16(values) if dtype == "bfloat16" else values.astype(dtype)
    moved = nudge(stored, dtype, "w", seed=1)
    assert (moved.shape, moved.dtype) == (stored.shape, stored.dtype)
    before, after = to_float64(stored, dtype), to_float64(moved, dtype)
    relative = np.abs(after[1:] - before[1:]) / np.abs(before[1:])
    assert (relative > 0).all()
    assert (relative <= EPSILON[dtype]).all()
    assert (after[0] == 0).all()
    assert 0.3 < (after[1:] > before[1:]).mean() < 0.7


def test_the_same_name_and_seed_give_the_same_twin() -> None:
    values = np.ones(64, np.float32)
    np.testing.assert_array_equal(nudge(values, "float32", "w", 1), nudge(values, "float32", "w", 1))
    assert (nudge(values, "float32", "w", 1) != nudge(values, "float32", "w", 2)).any()
    assert (nudge(values, "float32", "w", 1) != nudge(values, "float32", "v", 1)).any()


def test_what_cannot_be_moved_is_left_alone() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 0.0, np.finfo(np.float32).max], np.float32)
    assert nudge(odd, "float32", "w", 1).tobytes() == odd.tobytes()
    whole = np.arange(4)
    np.testing.assert_array_equal(nudge(whole, "int64", "w", 1), whole)


def test_frozen_weights_of_sixteen_bits_are_moved_unasked_and_those_of_float32_on_request() -> None:
    plain, base, none = Perturbation("rounding", 1), Perturbation("rounding", 1, base=True), Perturbation("threads")
    assert [plain.moves(dtype, trained=False) for dtype in ("float16", "bfloat16", "float32")] == [True, True, False]
    assert base.moves("float32", trained=False)
    assert plain.moves("float32", trained=True)
    assert not none.moves("bfloat16", trained=True)
