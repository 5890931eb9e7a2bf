"""The measures: exact where they must be, symmetric, and blind to nothing that hashes and norms are blind to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from differ.align import BLOCK, Tensor
from differ.compare import distance, element, max_ulp, multi_index, same_integers
from tracer.dtypes import float32_to_bf16


def tensor(values: object, dtype: str = "float32") -> Tensor:
    array = np.asarray(values, np.float32 if dtype == "bfloat16" else dtype)
    return Tensor(float32_to_bf16(array) if dtype == "bfloat16" else array, dtype)


def test_a_distance_names_the_largest_difference_and_its_place() -> None:
    measured = distance(tensor([[1, 2], [3, 4]]), tensor([[1, 2], [3, 4.5]]))

    assert (measured.max_abs, measured.at) == (0.5, 3)
    assert measured.rel_l2() == pytest.approx(0.5 / math.sqrt(1 + 4 + 9 + 4.5**2))
    assert multi_index(measured.at, (2, 2)) == (1, 1)


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: x[::-1], lambda x: np.roll(x, 1)])
def test_what_a_norm_cannot_see_is_seen(change: object) -> None:
    values = np.arange(1, 9, dtype=np.float32)
    assert distance(tensor(values), tensor(change(values))).rel_l2() > 0.3  # type: ignore[operator]


def test_two_zero_tensors_have_no_distance() -> None:
    measured = distance(tensor(np.zeros(4)), tensor(np.zeros(4)))
    assert measured.equal
    assert measured.rel_l2() == 0.0


def test_the_floor_keeps_noise_from_being_relative_to_noise() -> None:
    assert distance(tensor([1e-12]), tensor([-1e-12])).rel_l2(floor=1e-6) < 3e-6


def test_nan_equals_nan_only_in_the_same_place() -> None:
    assert distance(tensor([1, math.nan]), tensor([1, math.nan])).equal
    assert distance(tensor([1, math.nan]), tensor([math.nan, 1])).nonfinite == 0
    assert distance(tensor([1, math.inf]), tensor([1, math.inf])).equal
    assert distance(tensor([1, math.inf]), tensor([1, -math.inf])).nonfinite == 1
    assert distance(tensor([1, 2]), tensor([1, math.nan])).nonfinite == 1


def test_a_difference_behind_the_first_block_is_found() -> None:
    a = np.zeros(BLOCK + 10, np.float32)
    b = a.copy()
    b[BLOCK + 3] = 1
    assert distance(tensor(a), tensor(b)).at == BLOCK + 3
    assert same_integers(tensor(a, "int64"), tensor(b, "int64")) == BLOCK + 3


@pytest.mark.parametrize(("dtype", "step"), [("float32", 2.0**-23), ("bfloat16", 2.0**-7), ("float64", 2.0**-52)])
def test_one_unit_in_the_last_place_is_one(dtype: str, step: float) -> None:
    assert max_ulp(tensor([1.0], dtype), tensor([1.0 + step], dtype)) == 1


def test_units_are_counted_through_zero_and_in_the_coarser_dtype() -> None:
    smallest = float(np.nextafter(np.float32(0), np.float32(1)))
    assert max_ulp(tensor([smallest]), tensor([-smallest])) == 2
    assert max_ulp(tensor([1.0], "float64"), tensor([1.0 + 2.0**-7], "bfloat16")) == 1
    assert max_ulp(tensor([1], "int64"), tensor([2], "int64")) is None


def test_an_element_is_a_python_number() -> None:
    assert element(tensor([3], "int64"), 0) == 3
    assert element(tensor([0.5], "bfloat16"), 0) == 0.5
