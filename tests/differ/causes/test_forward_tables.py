"""`forward.rotary` and `forward.activation`: other tables of angles, other functions, beside outputs that are neither."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import F32
from tests.differ.causes.rows import Rows, compare, only_cause, shown
from tracer.dtypes import bf16_to_float32, float32_to_bf16
from tracer.schema import POSITIONS, Phase

# Sampled positions of two rows of 160 tokens, thinned as a recorder does.
LENGTH = 160
WHERE = np.array([(row, column) for row in (0, 1) for column in range(0, LENGTH, 5)])
TABLE, GATE, ACT = "model.rotary_emb", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.act_fn"
Round = Callable[[np.ndarray], np.ndarray]


def rounded(dtype: str) -> Round:
    def to(values: np.ndarray) -> np.ndarray:
        if dtype == "bfloat16":
            return bf16_to_float32(float32_to_bf16(values.astype(F32)))
        return values.astype(F32).astype(np.float16).astype(F32)

    return to


def plain(values: np.ndarray) -> np.ndarray:
    return values.astype(F32)


def table(
    base: float = 1e4,
    *,
    width: int = 16,
    rates: Round = plain,
    angles: Round = plain,
    cosines: Round = plain,
    positions: np.ndarray | None = None,
    stretch: float = 1.0,
) -> np.ndarray:
    """cos of the angles, both halves, as transformers computes it in float32 but for some stages."""
    at = WHERE[:, 1] if positions is None else positions
    inverse = rates(1.0 / (base ** (np.arange(0, width, 2, dtype=F32) / F32(width))) / stretch)
    angle = angles(angles(at)[:, None] * inverse)
    return cosines(np.tile(np.cos(angle), 2))


def outputs(values: np.ndarray, name: str = TABLE, **before: np.ndarray) -> Rows:
    """One step whose forward has the positions, outputs before and the one in question."""
    ids = np.random.default_rng(3).integers(10, 90, size=(2, LENGTH))
    return {
        (Phase.BATCH, 1, 0): {"input_ids": ids, "labels": ids},
        (Phase.FORWARD, 1, 0): {POSITIONS: WHERE.astype(np.int64), **before, name: values},
    }


# forward.rotary


@pytest.mark.parametrize("base", [5e5, 1e6, 9973.0])
@pytest.mark.parametrize("width", [16, 128])
def test_another_base_is_fitted(base: float, width: int, tmp_path: Path) -> None:
    a, b = table(width=width), table(base, width=width)

    cause, mirrored = only_cause(tmp_path, outputs(a), outputs(b), "forward.rotary")

    assert (cause.names, cause.side) == ((TABLE,), None)
    assert cause.parameters == {"base_a": 1e4, "base_b": pytest.approx(base, rel=1e-4)}
    assert mirrored.parameters == {"base_a": pytest.approx(base, rel=1e-4), "base_b": 1e4}


LOW: dict[str, dict[str, Any]] = {
    "rates": {"rates": True},
    "angles": {"rates": True, "angles": True},
    "tables": {"rates": True, "angles": True, "cosines": True},
}


@pytest.mark.parametrize("stage", LOW)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_table_in_low_precision_is_named_with_its_dtype_and_stage(stage: str, dtype: str, tmp_path: Path) -> None:
    b = table(1e6, width=64, **dict.fromkeys(LOW[stage], rounded(dtype)))

    cause, mirrored = only_cause(tmp_path, outputs(table(1e6, width=64)), outputs(b), "forward.rotary")

    assert (cause.side, mirrored.side) == ("b", "a")
    assert cause.parameters is not None
    assert (cause.parameters["base"], cause.parameters["dtype"], cause.parameters["stage"]) == (1e6, dtype, stage)
    assert cause.parameters["error"] > 0.0
    assert cause.parameters == mirrored.parameters


def test_positions_are_those_of_the_batch_where_it_has_some(tmp_path: Path) -> None:
    given = np.tile(np.arange(LENGTH) % 40, (2, 1))
    at = given[WHERE[:, 0], WHERE[:, 1]]
    a, b = outputs(table(positions=at)), outputs(table(5e5, positions=at))
    for rows in (a, b):
        rows[Phase.BATCH, 1, 0]["position_ids"] = given  # type: ignore[index]

    cause, _ = only_cause(tmp_path, a, b, "forward.rotary")

    assert cause.parameters == {"base_a": 1e4, "base_b": 5e5}


def shuffled() -> np.ndarray:
    return np.random.default_rng(5).permutation(table(), axis=1).astype(F32)


NEAR: dict[str, np.ndarray] = {
    "stretched positions": table(stretch=4.0),
    "positions from 1 on": table(positions=WHERE[:, 1] + 1),
    "noise": (table() + 0.01 * np.random.default_rng(5).normal(size=(len(WHERE), 16))).astype(F32),
    "columns in another order": shuffled(),
    "a factor": table() * F32(0.9),
    "any numbers": np.random.default_rng(5).uniform(-1, 1, (len(WHERE), 16)).astype(F32),
    "sines": np.sqrt(np.maximum(0.0, 1 - np.square(table()))).astype(F32),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_table_that_is_off_otherwise_is_not_claimed(name: str, tmp_path: Path) -> None:
    for rows in ((table(), NEAR[name]), (NEAR[name], table())):
        result = compare(tmp_path, *(outputs(each) for each in rows))

        assert result.first is not None
        assert result.first.name == TABLE
        assert "forward.rotary" not in shown(result)


def test_a_table_rounded_once_is_a_rounding_and_no_angles_in_low_precision(tmp_path: Path) -> None:
    b = table(cosines=rounded("bfloat16"))

    assert shown(compare(tmp_path, outputs(table()), outputs(b))) == ["precision.rounding"]


def test_equal_tables_and_equal_activations_have_no_cause(tmp_path: Path) -> None:
    assert compare(tmp_path, outputs(table()), outputs(table())).findings == ()
    assert compare(tmp_path, *(outputs(silu(X), ACT, **{GATE: X}) for _ in "ab")).findings == ()


# forward.activation

X = np.random.default_rng(11).normal(size=(len(WHERE), 24)).astype(F32) * F32(2)


def silu(x: np.ndarray) -> np.ndarray:
    return (x / (1 + np.exp(-x.astype(np.float64)))).astype(F32)


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return (x / (1 + np.exp(-1.702 * x.astype(np.float64)))).astype(F32)


def gelu(x: np.ndarray) -> np.ndarray:
    return (x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(F32)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return (x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))).astype(F32)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, F32(0))


def relu2(x: np.ndarray) -> np.ndarray:
    return np.square(relu(x))


Function = Callable[[np.ndarray], np.ndarray]


@pytest.mark.parametrize(
    ("f", "g"), [(gelu_tanh, gelu), (gelu, quick_gelu), (silu, gelu_tanh), (relu, gelu), (relu2, relu)]
)
def test_another_activation_is_named_by_both_functions(f: Function, g: Function, tmp_path: Path) -> None:
    a, b = (outputs(of(X), ACT, **{GATE: X}) for of in (f, g))

    cause, mirrored = only_cause(tmp_path, a, b, "forward.activation")

    assert (cause.names, cause.parameters) == ((ACT,), {"a": f.__name__, "b": g.__name__, "of": GATE})
    assert mirrored.parameters == {"a": g.__name__, "b": f.__name__, "of": GATE}


def test_the_two_formulas_of_gelu_are_as_far_apart_as_is_known(tmp_path: Path) -> None:
    a, b = (outputs(of(X), ACT, **{GATE: X}) for of in (gelu_tanh, gelu))

    cause, _ = only_cause(tmp_path, a, b, "forward.activation")

    assert cause.summary == f"{ACT} is GELU (tanh) of gate_proj in a, GELU (exact) in b: up to 0.00047 apart"


OTHERS: dict[str, dict[str, Any]] = {
    "of another slope": {"values": gelu(F32(1.1) * X)},
    "scaled": {"values": F32(1.01) * gelu_tanh(X)},
    "negated": {"values": -gelu_tanh(X)},
    "of another input": {"values": gelu(X[::-1])},
    "exact in one column only": {"values": np.where(np.arange(24) == 5, gelu(X), gelu_tanh(X))},
    "with noise": {"values": (gelu(X) + 1e-4 * np.random.default_rng(5).normal(size=X.shape)).astype(F32)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_activation_that_is_no_known_function_is_not_claimed(name: str, tmp_path: Path) -> None:
    result = compare(
        tmp_path, outputs(gelu_tanh(X), ACT, **{GATE: X}), outputs(OTHERS[name]["values"], ACT, **{GATE: X})
    )

    assert result.first is not None
    assert result.first.name == ACT
    assert "forward.activation" not in shown(result)


def test_without_its_input_an_activation_is_not_claimed(tmp_path: Path) -> None:
    elsewhere = {"model.layers.0.self_attn.q_proj": X}

    result = compare(tmp_path, outputs(gelu_tanh(X), ACT, **elsewhere), outputs(gelu(X), ACT, **elsewhere))

    assert result.first is not None
    assert shown(result) == []
