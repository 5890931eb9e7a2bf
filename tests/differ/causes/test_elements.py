"""Causes that compare element by element: layout, sign, precision, dropout, corruption; each beside its look-alikes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import F32
from tests.differ.causes.rows import A, B, Rows, compare, gradients, init, lora, only_cause, shown
from tests.differ.conftest import Compare
from tracer.dtypes import bf16_to_float32, float32_to_bf16
from tracer.schema import Phase

Change = Callable[[np.ndarray], np.ndarray]
ONE_OR_ALL = pytest.mark.parametrize("names", [B, B[1:2]], ids=["all", "one"])
EARLY_OR_LATE = pytest.mark.parametrize("at", [1, 3])


def run(
    change: Change | None = None, names: tuple[str, ...] = B, at: int = 1, phase: Phase = Phase.GRAD, **settings: Any
) -> Rows:
    """Three steps of gradients; from step `at` on some are changed."""
    rows = {}
    for step in (1, 2, 3):
        values = gradients(seed=step, **settings)
        rows[Phase.PARAM, step] = {"x": np.ones(4, F32)}  # so that the inputs of a step are known to agree
        rows[phase, step] = {n: change(v) if change and n in names and step >= at else v for n, v in values.items()}
    return rows


def noisy(values: np.ndarray, size: float = 1e-6) -> np.ndarray:
    rng = np.random.default_rng(17)
    return (values * (1 + size * rng.normal(size=values.shape))).astype(F32)


# layout.transpose


@ONE_OR_ALL
@EARLY_OR_LATE
def test_a_transposed_gradient_is_named(names: tuple[str, ...], at: int, tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(), run(lambda v: noisy(v).T.copy(), names, at), "layout.transpose")

    assert (cause.step, cause.phase, cause.names) == (at, "grad", tuple(sorted(names)))


def test_a_transposed_square_matrix_is_named(tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(columns=16), run(lambda v: v.T.copy(), B[:1], columns=16), "layout.transpose")

    assert cause.summary == f"{B[0]} is transposed: b is a read column by column"


def test_a_transposed_factor_at_init_is_named(tmp_path: Path) -> None:
    a = lora()

    cause, _ = only_cause(tmp_path, init(a), init({**a, A[0]: a[A[0]].T.copy()}), "layout.transpose")

    assert (cause.step, cause.phase, cause.names) == (0, "init", (A[0],))


def test_a_matrix_that_is_reshaped_is_not_transposed(tmp_path: Path) -> None:
    assert shown(compare(tmp_path, run(), run(lambda v: v.reshape(v.shape[::-1])))) == []


# layout.permutation


@ONE_OR_ALL
@EARLY_OR_LATE
@pytest.mark.parametrize("axis", [0, 1])
def test_permuted_rows_and_columns_are_named(names: tuple[str, ...], at: int, axis: int, tmp_path: Path) -> None:
    order = np.random.default_rng(2).permutation((16, 12)[axis])
    b = run(lambda v: np.take(v, order, axis), names, at)

    cause, mirrored = only_cause(tmp_path, run(), b, "layout.permutation")

    assert cause.names == tuple(sorted(names))
    assert cause.parameters == {"axis": axis, "form": "other", "permutation": order.tolist()}
    assert mirrored.parameters == {"axis": axis, "form": "other", "permutation": np.argsort(order).tolist()}


@pytest.mark.parametrize(
    ("order", "form", "back"),
    [
        (np.arange(16)[::-1], {"form": "reversed"}, {"form": "reversed"}),
        (np.roll(np.arange(16), -3), {"form": "rotated", "by": 3}, {"form": "rotated", "by": -3}),
        (np.arange(16).reshape(2, -1).T.reshape(-1), {"form": "interleaved"}, {"form": "deinterleaved"}),
    ],
)
def test_known_permutations_have_names(
    order: np.ndarray, form: dict[str, Any], back: dict[str, Any], tmp_path: Path
) -> None:
    cause, mirrored = only_cause(tmp_path, run(), run(lambda v: noisy(v)[order]), "layout.permutation")

    assert cause.parameters == {"axis": 0, **form}
    assert mirrored.parameters == {"axis": 0, **back}


def test_two_exchanged_rows_are_a_permutation(tmp_path: Path) -> None:
    order = np.arange(16)
    order[[4, 9]] = [9, 4]

    cause, _ = only_cause(tmp_path, run(), run(lambda v: v[order], B[:1]), "layout.permutation")

    assert cause.summary == f"{B[0]} has its rows in another order"


def test_sorted_noise_is_no_permutation(tmp_path: Path) -> None:
    # Two draws of one distribution nearly match once both are sorted.
    rng = np.random.default_rng(0)
    a, b = ({(Phase.GRAD, 1): {B[0]: rng.normal(size=(512, 1)).astype(F32)}} for _ in "ab")

    assert shown(compare(tmp_path, a, b)) == []


# sign


@ONE_OR_ALL
@EARLY_OR_LATE
def test_a_negated_gradient_is_named(names: tuple[str, ...], at: int, tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(), run(lambda v: -noisy(v), names, at), "sign")

    assert (cause.step, cause.names) == (at, tuple(sorted(names)))


@pytest.mark.parametrize("factor", [-0.98, -2.0])
def test_a_negative_factor_is_not_the_negative(factor: float, tmp_path: Path) -> None:
    assert "sign" not in shown(compare(tmp_path, run(), run(lambda v: v * F32(factor))))


# precision.rounding


def to_bf16(values: np.ndarray) -> np.ndarray:
    return bf16_to_float32(float32_to_bf16(values))


def to_fp16(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(F32)


def cut_to_bf16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)


@ONE_OR_ALL
@EARLY_OR_LATE
@pytest.mark.parametrize(
    ("change", "dtype", "mode"),
    [(to_bf16, "bfloat16", "nearest"), (to_fp16, "float16", "nearest"), (cut_to_bf16, "bfloat16", "toward_zero")],
)
def test_rounded_gradients_are_named_with_the_dtype(
    change: Change, dtype: str, mode: str, names: tuple[str, ...], at: int, tmp_path: Path
) -> None:
    cause, _ = only_cause(tmp_path, run(), run(change, names, at), "precision.rounding")

    assert (cause.step, cause.side, cause.names) == (at, "b", tuple(sorted(names)))
    assert cause.parameters == {"dtype": dtype, "mode": mode}


@pytest.mark.parametrize(("change", "mode"), [(to_bf16, "nearest"), (cut_to_bf16, "toward_zero")])
def test_gradients_of_another_framework_are_rounded_too(change: Change, mode: str, tmp_path: Path) -> None:
    cause, _ = only_cause(tmp_path, run(), run(lambda v: change(noisy(v, 2e-5))), "precision.rounding")

    # Next to the edges of their cells the noise decides.
    assert cause.names == tuple(sorted(B))
    assert cause.parameters == {"dtype": "bfloat16", "mode": mode}


def test_noise_of_the_size_of_bf16_is_no_rounding(tmp_path: Path) -> None:
    assert "precision.rounding" not in shown(compare(tmp_path, run(), run(lambda v: noisy(v, 2**-9))))


def test_numbers_of_bf16_that_are_others_are_no_rounding(tmp_path: Path) -> None:
    assert "precision.rounding" not in shown(compare(tmp_path, run(), run(lambda v: to_bf16(noisy(v, 0.02)))))


def test_zeros_are_no_rounding_of_small_numbers(tmp_path: Path) -> None:
    small, none = run(lambda v: v * F32(1e-4)), run(lambda v: v * F32(0))
    for pair in ((small, none), (none, small)):
        assert "precision.rounding" not in shown(compare(tmp_path, *pair))


# precision.overflow


def poked(value: float, count: int = 1) -> Change:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values.reshape(-1)[5 : 5 + count] = value
        return values

    return change


@ONE_OR_ALL
@EARLY_OR_LATE
@pytest.mark.parametrize(("value", "word"), [(np.inf, "inf"), (np.nan, "nan"), (-np.inf, "inf")])
def test_what_is_not_finite_is_counted(
    value: float, word: str, names: tuple[str, ...], at: int, tmp_path: Path
) -> None:
    cause, _ = only_cause(tmp_path, run(), run(poked(value, 2), names, at), "precision.overflow")

    assert (cause.step, cause.side, cause.names) == (at, "b", tuple(sorted(names)))
    assert cause.parameters == {"inf": 0, "nan": 0, word: 2 * len(names)}


def test_numbers_beyond_fp16_are_said_to_be(tmp_path: Path) -> None:
    a = run(lambda v: v * F32(30000))

    with np.errstate(over="ignore"):
        cause, _ = only_cause(tmp_path, a, run(lambda v: to_fp16(v * F32(30000))), "precision.overflow")

    assert cause.parameters is not None
    assert cause.parameters["beyond"] == 65504
    assert "a is beyond fp16's 65504 there" in cause.summary


def test_a_loss_that_is_nan_is_named(tmp_path: Path) -> None:
    a, b = ({(Phase.LOSS, 1): {"loss": F32(value)}} for value in (2.5, np.nan))

    cause, _ = only_cause(tmp_path, a, b, "precision.overflow")

    assert cause.summary == "b has 1 nan in loss, where a is finite"


def test_nan_at_the_same_place_on_both_sides_is_no_overflow(tmp_path: Path) -> None:
    assert compare(tmp_path, run(poked(np.nan)), run(poked(np.nan))).verdict.value == "same"
    assert "precision.overflow" not in shown(compare(tmp_path, run(poked(np.nan)), run(lambda v: poked(np.nan)(v * 2))))


# rng.dropout


def dropped(rate: float, seed: int) -> Change:
    def change(values: np.ndarray) -> np.ndarray:
        kept = np.random.default_rng([seed, values.size, int(1e6 * abs(values[0, 0]))]).random(values.shape) >= rate
        return (values * kept / (1 - rate)).astype(F32)

    return change


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.GRAD])
def test_other_elements_that_are_dropped(rate: float, phase: Phase, tmp_path: Path) -> None:
    a, b = (run(dropped(rate, seed), phase=phase, rows=64, columns=64) for seed in (1, 2))

    cause, mirrored = only_cause(tmp_path, a, b, "rng.dropout")

    assert cause.side is None
    assert cause.parameters == mirrored.parameters == {"rate": pytest.approx(rate, abs=0.02)}


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_on_one_side_only(rate: float, tmp_path: Path) -> None:
    b = run(dropped(rate, 1), B[:1], 2, rows=64, columns=64)

    cause, _ = only_cause(tmp_path, run(rows=64, columns=64), b, "rng.dropout")

    assert (cause.step, cause.side, cause.names) == (2, "b", B[:1])
    assert cause.parameters == {"rate": pytest.approx(rate, abs=0.02)}


def test_zeros_of_unused_rows_are_no_dropout(tmp_path: Path) -> None:
    def unused(seed: int) -> Change:
        return lambda v: v * (np.random.default_rng(seed).random((len(v), 1)) > 0.5).astype(F32)

    a, b = (run(unused(seed), rows=64, columns=64) for seed in (1, 2))

    assert "rng.dropout" not in shown(compare(tmp_path, a, b))


def test_a_rectifier_is_no_dropout(tmp_path: Path) -> None:
    b = run(lambda v: np.maximum(v, 0), phase=Phase.FORWARD, rows=64, columns=64)

    assert "rng.dropout" not in shown(compare(tmp_path, run(phase=Phase.FORWARD, rows=64, columns=64), b))


# corrupt.elements


@EARLY_OR_LATE
@pytest.mark.parametrize("count", [1, 16])
def test_a_handful_of_elements_is_listed(count: int, at: int, tmp_path: Path) -> None:
    cause, mirrored = only_cause(tmp_path, run(), run(poked(9.0, count), B[:1], at), "corrupt.elements")

    assert (cause.step, cause.names, cause.side) == (at, B[:1], None)
    assert cause.parameters is not None
    assert mirrored.parameters is not None
    assert (cause.parameters["elements"], cause.parameters["of"]) == (count, 192)
    assert cause.parameters["at"][0] == [0, 5]
    assert cause.parameters["b"] == mirrored.parameters["a"] == [9.0] * count


def test_elements_of_every_record_are_a_cause_each(tmp_path: Path) -> None:
    result = compare(tmp_path, run(), run(poked(9.0)))

    assert shown(result) == ["corrupt.elements"] * len(B)


def test_a_single_token_is_named(tmp_path: Path) -> None:
    ids = np.arange(24).reshape(2, 12)
    other = ids.copy()
    other[1, 4] = 77

    a, b = ({(Phase.BATCH, 1): {"input_ids": values}} for values in (ids, other))
    cause, _ = only_cause(tmp_path, a, b, "corrupt.elements")

    assert cause.summary == "1 element of 24 differs in input_ids at [1, 4] (a 16, b 77); the rest agrees to the bit"


def test_elements_among_rounding_noise_are_no_handful(tmp_path: Path) -> None:
    assert "corrupt.elements" not in shown(compare(tmp_path, run(), run(lambda v: poked(9.0)(noisy(v)))))


def test_more_than_a_handful_is_no_handful(tmp_path: Path) -> None:
    assert "corrupt.elements" not in shown(compare(tmp_path, run(), run(poked(9.0, 17))))


# All of them


def test_noise_has_no_cause(tmp_path: Path) -> None:
    result = compare(tmp_path, run(), run(noisy))

    assert (result.verdict.value, result.causes) == ("same", ())


@pytest.mark.parametrize("fault", ["grad_element", "param_element"])
def test_an_element_of_a_run_that_goes_on_is_named_once(fault: str, compare: Compare) -> None:
    result = compare(fault, noise=0.0)

    assert shown(result) == ["corrupt.elements"]
    assert result.first is not None
    assert result.causes[0].names == (result.first.name,)
    assert result.causes[0].side == ("b" if fault == "param_element" else None)


def test_a_clean_run_has_no_cause(compare: Compare) -> None:
    assert compare().causes == ()
