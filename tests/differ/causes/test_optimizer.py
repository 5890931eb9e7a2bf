"""Optimizer causes: rules that differ, settings that differ, and sides that do not do what they record."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.differ.causes.plant import A, B, causes, ids, mirrored, recorded, scaled
from tests.differ.conftest import Compare


@pytest.mark.parametrize(("beta1", "beta2", "ratio"), [(0.9, 0.999, 3.1623), (0.8, 0.99, 2.0)])
def test_no_bias_correction_is_named_with_its_ratio(beta1: float, beta2: float, ratio: float, compare: Compare) -> None:
    result = compare("bias_correction", beta1=beta1, beta2=beta2)

    (cause,) = causes(result, "optimizer.bias_correction")
    assert (cause.step, cause.phase, cause.side) == (1, "param", "b")
    assert cause.parameters == {"ratio": ratio, "update": 1, "beta1": beta1, "beta2": beta2}
    # A has no gradient while B is 0, and so no update to correct.
    assert cause.names == B
    assert cause.explains is not None
    assert cause.explains > 0.999
    assert ids(result) == ["optimizer.bias_correction"]


def test_bias_correction_changes_sides_with_a_and_b(compare: Compare, tmp_path: Path) -> None:
    compare("bias_correction")

    (cause,) = causes(mirrored(tmp_path), "optimizer.bias_correction")
    assert cause.side == "a"
    assert cause.summary == "a applies no bias correction (updates 3.162 times as large); b does"


@pytest.mark.parametrize("update", [3, 40])
def test_the_ratio_is_that_of_the_update_even_late(update: int, compare: Compare) -> None:
    steps = frozenset({0, 1, *range(2, update + 1)})
    from differ import DiffOptions

    result = compare("bias_correction", steps=update, only_steps=steps, options=DiffOptions(steps=(update, update)))

    (cause,) = causes(result, "optimizer.bias_correction")
    assert cause.step == update
    expected = (1 - 0.9**update) / math.sqrt(1 - 0.999**update)
    assert cause.parameters is not None
    assert cause.parameters["ratio"] == pytest.approx(expected, rel=1e-4)
    assert set(cause.names) == {*A, *B}


def test_a_learning_rate_of_the_same_ratio_is_no_bias_correction(compare: Compare) -> None:
    assert not causes(compare(b={"lr": 1e-2 * 10**0.5}), "optimizer.bias_correction")


@pytest.mark.parametrize("decay", [0.02, 0.2])
def test_another_weight_decay_setting_is_named_with_both_values(decay: float, compare: Compare) -> None:
    result = compare(b={"weight_decay": decay})

    (cause,) = causes(result, "optimizer.weight_decay")
    assert (cause.step, cause.phase, cause.names) == (1, "hparams", ("group0.weight_decay",))
    assert cause.parameters == {"setting": "weight_decay", "a": 0.01, "b": decay}
    assert cause.summary == f"weight decay: a 0.01, b {decay:g}"


@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_a_decay_that_is_recorded_and_not_applied(decay: float, compare: Compare) -> None:
    result = compare("no_decay", weight_decay=decay)

    (cause,) = causes(result, "optimizer.weight_decay")
    assert (cause.step, cause.phase, cause.side, cause.names) == (1, "param", "b", A)
    assert cause.summary == "b applies no weight decay; a decays the weights (decoupled)"
    assert ids(result) == ["optimizer.weight_decay"]


@pytest.mark.parametrize("decay", [0.01, 0.1])
def test_decay_added_to_the_gradient_is_found_in_the_moments(decay: float, compare: Compare) -> None:
    result = compare("coupled_decay", weight_decay=decay)

    (cause,) = causes(result, "optimizer.weight_decay")
    assert (cause.step, cause.phase, cause.side, cause.names) == (1, "opt_state", "b", A)
    assert cause.summary == "b adds the weight decay to the gradient (coupled); a decays the weights (decoupled)"


@pytest.mark.parametrize("decay", [0.05, 0.5])
def test_a_decay_of_another_size_than_recorded_is_fitted(decay: float, compare: Compare) -> None:
    result = compare(b={"weight_decay": decay, "declared_decay": 0.01}, a={"weight_decay": 0.01}, steps=4)

    found = causes(result, "optimizer.weight_decay")
    assert found, result.first
    assert (found[0].phase, found[0].side) == ("param", "b")
    assert found[0].parameters is not None
    assert found[0].parameters["decay"] == pytest.approx(decay, rel=2e-3)


@pytest.mark.parametrize("place", ["eps_inside", "eps_before"])
@pytest.mark.parametrize("eps", [1e-4, 1e-3])
def test_the_place_of_eps_is_named(place: str, eps: float, compare: Compare) -> None:
    result = compare(place, eps=eps)

    (cause,) = causes(result, "optimizer.eps")
    assert (cause.step, cause.phase, cause.side) == (1, "param", "b")
    assert cause.parameters == {"a": "outside", "b": place.removeprefix("eps_")}


@pytest.mark.parametrize("eps", [1e-4, 1e-2])
def test_another_eps_than_recorded_is_fitted(eps: float, compare: Compare) -> None:
    result = compare(b={"eps": eps, "edit": recorded(eps=1e-8)}, steps=4)

    found = causes(result, "optimizer.eps")
    assert found, result.first
    assert found[0].side == "b"
    assert found[0].parameters is not None
    assert found[0].parameters["eps"] == pytest.approx(eps, rel=0.02)


def test_another_eps_setting_is_named_with_both_values(compare: Compare) -> None:
    (cause,) = causes(compare(b={"eps": 1e-6}), "optimizer.eps")

    assert (cause.phase, cause.summary) == ("hparams", "eps: a 1e-08, b 1e-06")


@pytest.mark.parametrize("settings", [{"beta1": 0.8}, {"beta2": 0.95}, {"beta2": 0.99}])
def test_other_betas_than_recorded_are_fitted_from_the_moments(settings: dict[str, float], compare: Compare) -> None:
    result = compare(b={**settings, "edit": recorded(beta1=0.9, beta2=0.999)}, steps=4)

    found = causes(result, "optimizer.betas")
    assert found, result.first
    assert (found[0].phase, found[0].side, found[0].step) == ("opt_state", "b", 1)
    ((key, value),) = settings.items()
    assert found[0].parameters is not None
    assert found[0].parameters[key] == pytest.approx(value, rel=1e-4)
    assert set(ids(result)) == {"optimizer.betas"}


def test_another_beta_setting_is_named_with_both_values(compare: Compare) -> None:
    (cause,) = causes(compare(b={"beta2": 0.95}), "optimizer.betas")

    assert (cause.phase, cause.summary) == ("hparams", "moment decay (beta2): a 0.999, b 0.95")


@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("counter", [False, True])
def test_a_lost_state_is_named_with_its_step(at: int, counter: bool, compare: Compare) -> None:
    result = compare(b={"reset_at": at, "reset_counter": counter}, steps=5)

    (cause,) = causes(result, "optimizer.state_reset")
    assert (cause.step, cause.phase, cause.side) == (at, "opt_state", "b")
    assert {*B} <= set(cause.names)
    assert cause.parameters == {"kinds": ["exp_avg", "exp_avg_sq"], "counter": counter}
    assert ids(result) == ["optimizer.state_reset"]


def test_a_state_lost_for_one_parameter_names_that_one(compare: Compare) -> None:
    result = compare(b={"reset_at": 3, "reset_names": B[1]}, steps=4)

    (cause,) = causes(result, "optimizer.state_reset")
    assert (cause.step, cause.names) == (3, (B[1],))
    assert f"for {B[1]}" in cause.summary


def test_a_lost_momentum_buffer_is_a_lost_state(compare: Compare) -> None:
    result = compare(b={"reset_at": 3}, steps=4, optimizer="sgd", lr=1e-3)

    (cause,) = causes(result, "optimizer.state_reset")
    assert cause.step == 3


def test_a_changed_moment_is_no_lost_state(compare: Compare) -> None:
    result = compare("moment")

    assert not [found for found in ids(result) if found.startswith("optimizer")]


@pytest.mark.parametrize(
    "both",
    [{}, {"bias_correction": False}, {"decay": "coupled"}, {"eps_place": "inside"}, {"beta2": 0.95}, {"reset_at": 2}],
    ids=str,
)
def test_two_runs_under_one_rule_have_no_cause(both: dict[str, Any], compare: Compare) -> None:
    assert compare(**both).causes == ()


def test_other_gradients_under_one_rule_are_no_cause_in_the_optimizer(compare: Compare) -> None:
    result = compare(b={"tamper": scaled(1.5)})

    assert not [found for found in ids(result) if found.startswith("optimizer")]
