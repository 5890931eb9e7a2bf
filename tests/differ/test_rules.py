"""Clip and optimizer rules are identified from the numbers, and judged whatever happened before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from differ import DiffResult, Verdict
from tests.differ.causes.plant import B, with_data
from tests.differ.conftest import Compare
from tracer.schema import Phase, Row


def rules(result: DiffResult, phase: str) -> dict[str | None, Any]:
    return {note.side: note.parameters for note in result.notes if note.id == "rule" and note.phase == phase}


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": "value", "clip_value": 0.01},
        {"clip": "norm", "clip_value": 0.02},
        {"clip": "tensor", "clip_value": 0.02},
        {"clip": "norm", "clip_value": 1e6},
        {"bias_correction": False},
        {"decay": "coupled", "weight_decay": 0.1},
        {"eps_place": "inside", "eps": 1e-4},
        {"weight_decay": 0.0},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "nesterov": True},
        {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0},
        {"optimizer": "sgd", "momentum": 0.0},
        {"groups": True},
        {"lr": 0.0},
        {"base_dtype": "bfloat16"},
        {"micro_batches": 1},
        {"steps": 8},
    ],
    ids=str,
)
def test_two_runs_under_one_rule_are_the_same(settings: dict[str, Any], compare: Compare) -> None:
    result = compare(**settings)

    assert result.verdict is Verdict.SAME, result.first


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("clip_value", {"rule": "value", "value": 0.01}),
        ("clip_norm", {"rule": "norm", "value": 0.02}),
        ("clip_tensor", {"rule": "tensor", "value": 0.02}),
    ],
)
def test_a_clip_is_named_with_its_constant(fault: str, expected: dict[str, Any], compare: Compare) -> None:
    result = compare(fault)

    assert rules(result, "clipped_grad") == {"a": {"rule": "none"}, "b": expected}


def test_clipping_at_two_constants_is_a_divergence(compare: Compare) -> None:
    result = compare(a={"clip": "norm", "clip_value": 0.02}, b={"clip": "norm", "clip_value": 0.0202})

    assert result.first is not None
    assert result.first.phase == "clipped_grad"
    assert rules(result, "clipped_grad")["b"] == {"rule": "norm", "value": 0.0202}


def test_a_limit_that_nothing_reaches_agrees_with_no_clipping(compare: Compare) -> None:
    assert compare(b={"clip": "value", "clip_value": 100.0}).verdict is Verdict.SAME


def test_value_against_norm_is_a_divergence_with_both_named(compare: Compare) -> None:
    result = compare(a={"clip": "norm", "clip_value": 0.02}, b={"clip": "value", "clip_value": 0.01})

    assert rules(result, "clipped_grad") == {
        "a": {"rule": "norm", "value": 0.02},
        "b": {"rule": "value", "value": 0.01},
    }


@pytest.mark.parametrize(
    ("fault", "phase", "aspects"),
    [
        ("bias_correction", "param", ({"correction": "yes"}, {"correction": "no"})),
        ("no_decay", "param", ({"decay": "decoupled"}, {"decay": "none"})),
        ("coupled_decay", "opt_state", ({"decay": "none"}, {"decay": "coupled"})),
        ("eps_inside", "param", ({"eps": "outside"}, {"eps": "inside"})),
        ("eps_before", "param", ({"eps": "outside"}, {"eps": "before"})),
    ],
)
def test_an_optimizer_rule_is_named_by_the_aspect_that_differs(
    fault: str, phase: str, aspects: tuple[dict[str, str], dict[str, str]], compare: Compare
) -> None:
    result = compare(fault)

    found = rules(result, phase)
    assert (dict(found["a"]), dict(found["b"])) == aspects


def test_nesterov_against_plain_momentum_is_found_in_the_parameters(compare: Compare) -> None:
    result = compare(b={"nesterov": True}, optimizer="sgd")

    assert result.first is not None
    assert (result.first.step, result.first.phase) == (1, "param")
    assert dict(rules(result, "param")["b"]) == {"nesterov": "yes"}


def test_a_rule_that_differs_at_every_step_is_one_finding(compare: Compare) -> None:
    result = compare("bias_correction", steps=6)

    assert len(result.findings) == 1
    assert result.counts.propagated > 0
    assert any(note.id == "repeated" and note.phase == "param" for note in result.notes)


def test_an_unknown_optimizer_is_said_and_compared_across(compare: Compare) -> None:
    result = compare(unknown_optimizer=True)

    assert result.verdict is Verdict.SAME, result.first
    assert any(note.summary == "b follows no known optimizer rule in param" for note in result.notes)


def test_an_unknown_optimizer_that_differs_is_found(compare: Compare) -> None:
    result = compare(b={"unknown_optimizer": True})

    assert result.first is not None
    assert (result.first.step, result.first.phase) == (1, "param")


def test_an_unknown_clip_on_both_sides_is_compared_across(compare: Compare) -> None:
    same = compare("clip_unknown", a={"clip": "sign"}, noise=1e-8)
    assert same.verdict is Verdict.SAME, same.first
    assert any("follows no known clipping rule" in note.summary for note in same.notes)


def test_a_run_without_recorded_settings_is_compared_across(compare: Compare) -> None:
    from tracer.schema import Phase

    result = compare(what=frozenset(Phase) - {Phase.HPARAMS})

    assert result.verdict is Verdict.SAME, result.first
    assert any(note.id == "rule.unrecorded" for note in result.notes)


def reshaped(phase: Phase, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Row], Row]:
    """Records of layer 1's lora_B in one phase, of another shape than in the others."""

    def edit(row: Row) -> Row:
        if row.phase is not phase:
            return row
        records = [r if B[1] not in r.name or r.data is None else with_data(r, change(r.data)) for r in row.records]
        return replace(row, records=tuple(records))

    return edit


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.reshape(-1)[:5].copy(),
        lambda x: x.reshape(-1)[0].copy(),
        lambda x: x[:0].copy(),
        lambda x: x.T.copy(),
    ],
    ids=["shorter", "a scalar", "empty", "transposed"],
)
@pytest.mark.parametrize("phase", [Phase.GRAD, Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM])
def test_what_is_of_another_shape_than_its_inputs_is_no_error(
    phase: Phase, change: Callable[[np.ndarray], np.ndarray], compare: Compare
) -> None:
    edit = reshaped(phase, change)

    result = compare(clip="value", clip_value=0.01, edit=edit, b={"lr": 0.0101})

    assert result.first is not None
    assert result.first.name == "group0.lr"
    assert compare(clip="value", clip_value=0.01, b={"edit": edit}).first is not None


@pytest.mark.parametrize("beta", ["beta1", "beta2"])
def test_a_beta_of_one_is_no_error(beta: str, compare: Compare) -> None:
    def edit(row: Row) -> Row:
        if row.phase is not Phase.HPARAMS:
            return row
        one = np.asarray(1.0)
        return replace(row, records=tuple(replace(r, data=one) if r.name.endswith(beta) else r for r in row.records))

    result = compare(edit=edit)

    assert result.verdict is Verdict.SAME
    assert "rule.unknown" in {note.id for note in result.notes}
