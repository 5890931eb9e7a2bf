"""Gradient causes: a factor, the adapters' scale, none or zero, left over, averaged without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import DiffResult, diff
from tests.builders import F32, record
from tests.differ.causes.plant import A, B, causes, edited, ids, mirrored, scaled, uncleared
from tests.differ.conftest import Compare
from tracer.schema import WHOLE_STEP, Phase, Row
from tracer.writer import TraceWriter

NO_SCALE = edited(Phase.INIT, lambda one: None, name="lora_scale")


@pytest.mark.parametrize(
    ("factor", "matches"),
    [(2.0, "the number of micro-batches (2)"), (0.5, "the number of micro-batches (2)"), (1.37, "")],
)
@pytest.mark.parametrize("at", [1, 3])
def test_one_factor_in_all_gradients_is_fitted_and_named(
    factor: float, matches: str, at: int, compare: Compare
) -> None:
    result = compare(b={"tamper": scaled(factor, at=range(at, 9))})

    (cause,) = causes(result, "grad.scale")
    assert (cause.step, cause.phase) == (at, "grad")
    assert cause.parameters is not None
    assert cause.parameters["factor"] == pytest.approx(factor, rel=1e-5)
    assert matches in cause.parameters["matches"]
    assert set(cause.names) == (set(B) if at == 1 else {*A, *B})


def test_a_factor_in_one_parameter_names_that_one(compare: Compare) -> None:
    result = compare(b={"tamper": scaled(3.0, at=(2,), names=A[1])})

    (cause,) = causes(result, "grad.scale")
    assert (cause.step, cause.names) == (2, (A[1],))
    assert cause.parameters is not None
    assert cause.parameters["whole"] is False
    assert cause.summary.startswith("1 of 6 gradients of b are 3 times those of a")


def test_the_factor_is_inverse_with_a_and_b_in_each_others_place(compare: Compare, tmp_path: Path) -> None:
    compare(b={"tamper": scaled(4.0)})

    (cause,) = causes(mirrored(tmp_path), "grad.scale")
    assert cause.parameters is not None
    assert cause.parameters["factor"] == pytest.approx(0.25, rel=1e-5)
    assert "of a are 4 times those of b" in cause.summary


def test_two_factors_are_two_causes(compare: Compare) -> None:
    def tamper(step: int, grads: dict[str, np.ndarray]) -> None:
        scaled(2.0, names=B[0])(step, grads)
        scaled(5.0, names=B[2])(step, grads)

    result = compare(b={"tamper": tamper})

    assert {cause.names for cause in causes(result, "grad.scale")} == {(B[0],), (B[2],)}


@pytest.mark.parametrize("fault", ["grad_element", "label_masked"])
def test_another_difference_is_no_factor(fault: str, compare: Compare) -> None:
    result = compare(fault)

    assert not causes(result, "grad.scale")
    assert not causes(result, "lora.scale")


def test_an_opposite_sign_is_no_factor(compare: Compare) -> None:
    assert "grad.scale" not in ids(compare(b={"tamper": scaled(-1.0)}))


@pytest.mark.parametrize(("scale", "matches"), [(4.0, "the LoRA rank (2)"), (6.0, "")])
def test_another_adapter_scale_is_found_at_init(scale: float, matches: str, compare: Compare) -> None:
    result = compare(b={"scale": scale})

    (cause,) = causes(result, "lora.scale")
    assert (cause.step, cause.phase, len(cause.names)) == (0, "init", 3)
    assert cause.parameters is not None
    assert (cause.parameters["a"], cause.parameters["b"], cause.parameters["gradients"]) == (2.0, scale, True)
    assert matches in cause.parameters["matches"]


@pytest.mark.parametrize(
    ("ratio", "given"), [(3.0, {"micro_batches": 3}), (4.0, {"rows": 4}), (20.0, {"rows": 4})], ids=str
)
@pytest.mark.parametrize("side", ["a", "b"])
def test_an_adapter_scale_is_not_named_after_the_batch(
    ratio: float, given: dict[str, int], side: str, compare: Compare
) -> None:
    scales = {side: {"scale": 2.0 * ratio, "declared": {"accumulation": ratio}}}
    result = compare(
        **{"a": {"declared": {"accumulation": 1}}, "b": {"declared": {"accumulation": 1}}, **scales, **given}
    )

    (cause,) = causes(result, "lora.scale")
    other = "a" if side == "b" else "b"
    assert cause.summary.endswith(f"({side} {ratio:g} times {other})")
    # A gradient of that size is.
    scaled_by = compare(b={"tamper": scaled(ratio)}, **given)
    assert causes(scaled_by, "grad.scale")[0].parameters["matches"]  # type: ignore[index]


@pytest.mark.parametrize("scale", [4.0, 16.0])
def test_where_the_scale_is_not_recorded_the_gradients_of_b_tell(scale: float, compare: Compare) -> None:
    result = compare(b={"scale": scale}, edit=NO_SCALE)

    (cause,) = causes(result, "lora.scale")
    assert (cause.step, cause.phase, cause.names) == (1, "grad", B)
    assert cause.parameters is not None
    assert cause.parameters["factor"] == scale / 2
    assert "grad.scale" not in ids(result)


def test_a_factor_in_b_with_equal_recorded_scales_is_no_adapter_scale(compare: Compare) -> None:
    result = compare(b={"tamper": scaled(8.0, names="lora_B")})

    assert ids(result) == ["grad.scale"]


def test_a_factor_in_b_after_the_first_update_is_no_adapter_scale(compare: Compare) -> None:
    result = compare(b={"tamper": scaled(8.0, at=(2,), names="lora_B"), "edit": NO_SCALE}, a={"edit": NO_SCALE})

    assert ids(result) == ["grad.scale"]


@pytest.mark.parametrize("at", [1, 2])
def test_a_parameter_without_a_gradient_is_named(at: int, compare: Compare) -> None:
    result = compare("grad_none", at=at)

    (cause,) = causes(result, "grad.missing")
    assert (cause.step, cause.side, cause.names) == (at, "b", (B[1],))
    assert cause.summary == f"b has no gradient for {B[1]}; a has one"


def test_a_gradient_of_zero_is_not_a_missing_one(compare: Compare, tmp_path: Path) -> None:
    result = compare("grad_zero")

    (cause,) = causes(result, "grad.zero")
    assert (cause.step, cause.side, cause.names) == (2, "b", (B[1],))
    assert not causes(result, "grad.missing")
    assert causes(mirrored(tmp_path), "grad.zero")[0].side == "a"


def test_zero_gradients_in_several_layers_are_counted(compare: Compare) -> None:
    result = compare(b={"tamper": scaled(0.0, at=(2,))})

    (cause,) = causes(result, "grad.zero")
    assert set(cause.names) == {*A, *B}
    assert cause.summary == "b has a zero gradient for 6 of 6 parameters in layers 0–2; a has one"


def test_a_small_gradient_is_not_a_zero_one(compare: Compare) -> None:
    assert not causes(compare(b={"tamper": scaled(1e-3, at=(2,))}), "grad.zero")


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize(("names", "found"), [("", {*A, *B}), (B[1], {B[1]})])
def test_gradients_that_were_not_cleared_are_named(at: int, names: str, found: set[str], compare: Compare) -> None:
    result = compare(b={"tamper": uncleared(at, names=names)})

    (cause,) = causes(result, "grad.stale")
    assert (cause.step, cause.side) == (at, "b")
    # At step 2 there is nothing left over for A: its gradient was 0 at step 1.
    assert set(cause.names) == (found - set(A) if at == 2 else found)
    assert cause.parameters == {"kind": "added", "from_step": at - 1}


def test_the_gradient_of_the_step_before_used_again_is_stale(compare: Compare) -> None:
    kept: dict[str, np.ndarray] = {}

    def tamper(step: int, grads: dict[str, np.ndarray]) -> None:
        fresh = {name: values.copy() for name, values in grads.items()}
        grads.update(kept if step == 3 else {})
        kept.update(fresh)

    (cause,) = causes(compare(b={"tamper": tamper}), "grad.stale")

    assert cause.parameters == {"kind": "instead", "from_step": 2}


def test_a_scaled_gradient_is_not_stale(compare: Compare) -> None:
    assert not causes(compare(b={"tamper": scaled(2.0, at=(3,))}), "grad.stale")


@pytest.mark.parametrize("lengths", [(11, 101), (3, 4)])
def test_a_mean_of_means_is_told_from_a_mean_over_tokens(lengths: tuple[int, int], tmp_path: Path) -> None:
    result = _accumulated(tmp_path, lengths, parts=True)

    (cause,) = causes(result, "grad.mean_of_means")
    assert (cause.step, cause.side) == (1, "b")
    assert set(cause.names) == set(B)
    assert cause.parameters == {"tokens": [float(length) for length in lengths]}
    assert causes(mirrored(tmp_path), "grad.mean_of_means")[0].side == "a"


def test_without_the_gradients_of_the_micro_batches_no_mean_of_means_is_claimed(tmp_path: Path) -> None:
    assert not causes(_accumulated(tmp_path, (11, 101), parts=False), "grad.mean_of_means")


def test_other_weights_than_those_two_are_no_mean_of_means(tmp_path: Path) -> None:
    assert not causes(_accumulated(tmp_path, (11, 101), parts=True, weights=(0.7, 0.3)), "grad.mean_of_means")


@pytest.mark.parametrize("both", [{}, {"scale": 4.0}, {"edit": NO_SCALE}], ids=["plain", "scaled", "edited"])
def test_two_runs_with_the_same_gradients_have_no_cause(both: dict[str, Any], compare: Compare) -> None:
    assert compare(**both).causes == ()


def _accumulated(
    folder: Path, lengths: tuple[int, int], *, parts: bool, weights: tuple[float, float] = (0.5, 0.5)
) -> DiffResult:
    """a weighs two micro-batches by their lengths, b by `weights`."""
    by_tokens = (lengths[0] / sum(lengths), lengths[1] / sum(lengths))
    _write(folder / "a.h5", lengths, by_tokens, parts=parts)
    _write(folder / "b.h5", lengths, weights, parts=parts)
    result = diff(folder / "a.h5", folder / "b.h5")
    assert {finding.phase for finding in result.findings} == {"grad"}
    return result


def _write(path: Path, lengths: tuple[int, int], weights: tuple[float, float], *, parts: bool) -> None:
    """One step: parameters, two batches, two losses, the accumulated gradient, and the gradient of each micro-batch."""
    draw = np.random.default_rng(3)
    init = [record(name, draw.normal(size=(8, 2)).astype(F32)) for name in B]
    micro = [{name: draw.normal(size=(8, 2)).astype(F32) for name in B} for _ in lengths]
    rows = []
    for number, length in enumerate(lengths):
        batch = (record("input_ids", draw.integers(0, 9, size=(1, length + 1))), record("tokens", np.int64(length)))
        rows += [Row(Phase.BATCH, 1, number, batch), Row(Phase.LOSS, 1, number, (record("loss", F32(2 + number)),))]
    total = {name: sum(F32(weight) * part[name] for weight, part in zip(weights, micro, strict=True)) for name in B}
    gradients = [(WHOLE_STEP, total), *(enumerate(micro) if parts else ())]
    for number, values in gradients:
        rows.append(Row(Phase.GRAD, 1, number, tuple(record(name, values[name]) for name in B)))
    writer = TraceWriter(path, env={}, declared={}, overwrite=True)
    writer.write_step(0, [Row(Phase.INIT, 0, WHOLE_STEP, tuple(init))], {"model.dtype": "float32"})
    writer.write_step(1, rows)
    writer.finish()
