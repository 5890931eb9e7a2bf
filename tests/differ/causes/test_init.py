"""Causes of a difference at the start: each is planted at two strengths, in one record and in all, beside its look-alikes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from differ.result import Kind
from tests.builders import F32, record
from tests.differ.causes.rows import MODULES, A, B, W, compare, frozen, init, lora, only_cause, shown
from tracer.dtypes import bf16_to_float32, float32_to_bf16


def drawn(values: dict[str, np.ndarray], names: tuple[str, ...], seed: int = 9) -> dict[str, np.ndarray]:
    other = lora(seed)
    return {name: other[name] if name in names else value for name, value in values.items()}


# init.names


def test_another_rank_is_named_with_both(tmp_path: Path) -> None:
    cause, mirrored = only_cause(tmp_path, init(lora(rank=8)), init(lora(rank=16)), "init.names")

    assert cause.parameters == {"rank_a": 8, "rank_b": 16}
    assert mirrored.parameters == {"rank_a": 16, "rank_b": 8}
    assert cause.names == tuple(sorted(A + B))
    assert cause.summary == "LoRA rank 8 in a, 16 in b, in 6 modules"


def test_modules_that_one_side_does_not_adapt_are_named(tmp_path: Path) -> None:
    a = lora()
    b = {name: value for name, value in a.items() if "v_proj" not in name}

    cause, _ = only_cause(tmp_path, init(a), init(b), "init.names")

    assert cause.side == "b"
    assert cause.parameters == {
        "only_a": 4, "only_b": 0, "modules_a": ["k_proj", "q_proj", "v_proj"], "modules_b": ["k_proj", "q_proj"],
    }  # fmt: skip
    assert cause.summary == "b adapts k_proj, q_proj; a adapts k_proj, q_proj, v_proj"


def test_one_parameter_that_is_trained_on_one_side_is_named(tmp_path: Path) -> None:
    a = lora()
    b = {name: value for name, value in a.items() if name != B[1]}

    cause, _ = only_cause(tmp_path, init(a), init(b), "init.names")

    assert (cause.side, cause.names) == ("b", (B[1],))
    assert cause.summary == f"{B[1]} trained in a only"


def test_a_factor_of_another_module_width_is_no_rank(tmp_path: Path) -> None:
    result = compare(tmp_path, init(lora(width=64)), init(lora(width=32)))

    assert "init.names" not in shown(result)


# init.draw


@pytest.mark.parametrize("names", [A, A[2:3]])
def test_another_draw_is_named(names: tuple[str, ...], tmp_path: Path) -> None:
    a = lora()

    cause, _ = only_cause(tmp_path, init(a), init(drawn(a, names)), "init.draw")

    assert cause.names == tuple(sorted(names))
    assert cause.explains == pytest.approx(1.0)
    assert cause.side is None


def test_a_draw_that_half_agrees_is_no_other_draw(tmp_path: Path) -> None:
    a = lora()
    other = lora(9)
    b = {name: ((value + other[name]) / np.sqrt(2)).astype(F32) for name, value in a.items()}

    assert shown(compare(tmp_path, init(a), init(b))) == []


def test_a_draw_of_another_distribution_is_not_the_same_one(tmp_path: Path) -> None:
    a = lora(rank=32, width=256)
    rng = np.random.default_rng(1)
    b = {name: rng.normal(0, v.std(), v.shape).astype(F32) if name in A else v for name, v in a.items()}

    assert shown(compare(tmp_path, init(a), init(b))) == []


# init.scale


@pytest.mark.parametrize("ratio", [1.01, np.sqrt(3)])
@pytest.mark.parametrize("names", [A, A[:1]])
def test_the_same_draw_at_another_scale_is_named_with_the_ratio(
    ratio: float, names: tuple[str, ...], tmp_path: Path
) -> None:
    a = lora()
    b = {name: (value * F32(ratio) if name in names else value) for name, value in a.items()}

    cause, mirrored = only_cause(tmp_path, init(a), init(b), "init.scale")

    assert cause.names == tuple(sorted(names))
    assert cause.parameters is not None
    assert mirrored.parameters is not None
    assert cause.parameters["draw"] == "same"
    assert cause.parameters["ratio"] == pytest.approx(ratio, rel=1e-6)
    assert mirrored.parameters["ratio"] == pytest.approx(1 / ratio, rel=1e-6)


def test_two_scales_are_two_causes(tmp_path: Path) -> None:
    a = lora()
    b = {name: value * F32(2 if name in A[:3] else 3) for name, value in a.items()}

    found = compare(tmp_path, init(a), init(b)).causes

    assert [(cause.id, cause.parameters["ratio"], cause.names) for cause in found if cause.parameters] == [
        ("init.scale", pytest.approx(2), tuple(sorted(A[:3]))),
        ("init.scale", pytest.approx(3), tuple(sorted(A[3:]))),
    ]


def test_another_draw_at_another_scale_is_named_with_the_ratio(tmp_path: Path) -> None:
    a = lora()
    b = {name: value * F32(2) for name, value in lora(9).items()}

    cause, mirrored = only_cause(tmp_path, init(a), init(b), "init.scale")

    assert cause.parameters is not None
    assert mirrored.parameters is not None
    assert cause.parameters["draw"] == "other"
    assert cause.parameters["ratio"] == pytest.approx(2, rel=0.05)
    assert mirrored.parameters["ratio"] == pytest.approx(1 / cause.parameters["ratio"])


# init.swapped


@pytest.mark.parametrize("pairs", [1, 3])
def test_exchanged_modules_are_named(pairs: int, tmp_path: Path) -> None:
    a = lora()
    place = {A[2 * i]: A[2 * i + 1] for i in range(pairs)}
    place |= {other: one for one, other in place.items()}
    b = {name: a[place.get(name, name)] for name in a}

    cause, _ = only_cause(tmp_path, init(a), init(b), "init.swapped")

    assert cause.names == tuple(sorted(place))
    assert cause.parameters == {"pairs": sorted(sorted(pair) for pair in {frozenset(pair) for pair in place.items()})}


def test_exchanged_frozen_weights_are_named_by_their_digests(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = {name: frozen(rng.normal(size=(8, 8))) for name in W[:3]}
    b = {W[0]: a[W[1]], W[1]: a[W[0]], W[2]: a[W[2]]}

    cause, _ = only_cause(tmp_path, init(a), init(b), "init.swapped")

    assert cause.summary == f"in each other's place: {W[1]} and {W[0]}"


def test_modules_off_by_one_are_a_cycle(tmp_path: Path) -> None:
    a = lora()
    b = {**a, **{name: a[A[(i + 1) % len(A)]] for i, name in enumerate(A)}}

    cause, mirrored = only_cause(tmp_path, init(a), init(b), "init.swapped")

    assert cause.names == tuple(sorted(A))
    assert cause.parameters is not None
    assert mirrored.parameters is not None
    start, *rest = cause.parameters["cycle"]
    assert mirrored.parameters["cycle"] == [start, *reversed(rest)]


def test_a_copy_that_replaces_another_tensor_is_no_exchange(tmp_path: Path) -> None:
    a = lora()

    assert "init.swapped" not in shown(compare(tmp_path, init(a), init({**a, A[0]: a[A[1]]})))


# init.frozen


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(16, 8)).astype(F32) for name in W}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_of_all_frozen_weights_is_named_with_its_dtype(dtype: str, tmp_path: Path) -> None:
    a = {name: frozen(value) for name, value in weights().items()}
    b = {name: frozen(value, dtype) for name, value in weights().items()}

    cause, _ = only_cause(tmp_path, init(a), init(b), "init.frozen")

    assert (cause.side, cause.parameters, cause.names) == ("b", {"cast": dtype}, tuple(sorted(W)))
    assert cause.summary == f"b has all {len(W)} frozen weights cast to {dtype}"
    assert cause.explains == pytest.approx(1.0)


def test_a_cast_there_and_back_shows_in_the_extremes(tmp_path: Path) -> None:
    a = {name: frozen(value) for name, value in weights().items()}
    b = {name: frozen(bf16_to_float32(float32_to_bf16(value))) for name, value in weights().items()}

    cause, _ = only_cause(tmp_path, init(a), init(b), "init.frozen")

    assert (cause.side, cause.parameters) == ("b", {"cast": "bfloat16"})


def test_one_frozen_weight_that_is_scaled_is_named_with_the_ratio(tmp_path: Path) -> None:
    a = weights()
    b = {**a, W[2]: a[W[2]] * F32(1.5)}

    cause, mirrored = only_cause(
        tmp_path, *(init({n: frozen(v) for n, v in side.items()}) for side in (a, b)), "init.frozen"
    )

    assert cause.names == (W[2],)
    assert cause.parameters is not None
    assert mirrored.parameters is not None
    assert cause.parameters["ratio"] == pytest.approx(1.5)
    assert mirrored.parameters["ratio"] == pytest.approx(1 / 1.5)


def test_one_frozen_weight_of_other_numbers_is_named_without_a_claim(tmp_path: Path) -> None:
    a = weights()
    b = {**a, W[4]: weights(7)[W[4]]}

    cause, _ = only_cause(tmp_path, *(init({n: frozen(v) for n, v in side.items()}) for side in (a, b)), "init.frozen")

    assert (cause.names, cause.parameters, cause.explains) == ((W[4],), {}, None)


def test_a_frozen_weight_with_its_numbers_elsewhere_is_said_to_be_reordered(tmp_path: Path) -> None:
    a = weights()
    b = {**a, W[0]: a[W[0]].T.reshape(16, 8)}

    cause, _ = only_cause(tmp_path, *(init({n: frozen(v) for n, v in side.items()}) for side in (a, b)), "init.frozen")

    assert cause.parameters == {"same_numbers": True}


def test_another_checkpoint_is_no_cast(tmp_path: Path) -> None:
    a = {name: frozen(value) for name, value in weights().items()}
    b = {name: frozen(value, "bfloat16") for name, value in weights(7).items()}

    cause, _ = only_cause(tmp_path, init(a), init(b), "init.frozen")

    assert (cause.side, cause.parameters) == (None, {})


def test_equal_starts_have_no_cause(tmp_path: Path) -> None:
    values = {**lora(), **{name: frozen(value) for name, value in weights().items()}}
    values |= {f"{module}.lora_scale": np.float64(2) for module in MODULES}

    result = compare(tmp_path, init(values), init(values))

    assert (result.verdict.value, result.causes) == ("same", ())


def test_float16_weights_that_bfloat16_can_hold_were_cast_from_it(tmp_path: Path) -> None:
    values = {name: bf16_to_float32(float32_to_bf16(w)) for name, w in zip(W, _weights(), strict=True)}
    stored = init({name: frozen(w, "bfloat16") for name, w in values.items()})
    forced = init({name: frozen(w, "float16") for name, w in values.items()})

    cause, mirrored = only_cause(tmp_path, stored, forced, "init.frozen")

    assert (cause.side, cause.parameters) == ("b", {"cast": "float16"})
    assert mirrored.side == "a"


def _weights() -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [rng.uniform(0.1, 1.0, (8, 8)).astype(F32) for _ in W]


# Tied parameters.


def test_a_parameter_that_is_tied_on_one_side_and_trained_by_itself_on_the_other_is_found(tmp_path: Path) -> None:
    embedding = np.random.default_rng(2).normal(size=(8, 4)).astype(F32)
    tie = replace(record("", embedding), stored=False, alias_of="init/embed.weight")
    tied = init({"embed.weight": embedding, "head.weight": tie})
    copied = init({"embed.weight": embedding, "head.weight": embedding})

    for a, b in ((tied, copied), (copied, tied)):
        first = compare(tmp_path, a, b).first
        assert first is not None
        assert (first.step, first.phase, first.name, first.kind) == (0, "init", "head.weight", Kind.STATE)
        assert {first.a, first.b} == {"tied to embed.weight", "a parameter of its own"}
    assert compare(tmp_path, tied, tied).first is None
