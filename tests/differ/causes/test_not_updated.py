"""`param.not_updated`: updates that are lost for one parameter and for all, beside updates that are only changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import Verdict
from tests.builders import F32
from tests.differ.causes.plant import A, B, Edit, causes, ids, mirrored, with_data
from tests.differ.conftest import Compare
from tracer.schema import Phase, Record, Row

ID = "param.not_updated"
# Parameter before and after an update -> what is there instead.
Instead = Callable[[np.ndarray, np.ndarray], np.ndarray]


def instead(make: Instead, *, at: int = 3, names: tuple[str, ...] = (A[1],)) -> Edit:
    """Record other parameters after step `at`, which is the last: later steps would follow from them."""
    before: dict[str, np.ndarray] = {}

    def change(one: Record) -> Record:
        if one.name in names:
            return with_data(one, make(before[one.name], np.asarray(one.data)))
        return one

    def edit(row: Row) -> Row:
        if row.phase not in (Phase.INIT, Phase.PARAM):
            return row
        if row.phase is Phase.PARAM and row.step == at:
            return replace(row, records=tuple(change(one) for one in row.records))
        before.update({one.name: np.array(one.data) for one in row.records if one.data is not None})
        return row

    return edit


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("at", [2, 4])
def test_a_lost_update_is_named_with_its_parameter(optimizer: str, at: int, compare: Compare, tmp_path: Path) -> None:
    result = compare("param_stuck", optimizer=optimizer, steps=4, b={"at": at})

    (cause,) = causes(result, ID)
    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.name) == (at, "param", B[1])
    assert (cause.step, cause.phase, cause.side, cause.names) == (at, "param", "b", (B[1],))
    assert cause.parameters is not None
    assert (cause.parameters["applied"], cause.parameters["decayed"]) == (0.0, False)
    assert cause.parameters["due"] > 0.0
    assert cause.explains == 1.0
    assert ids(result)[0] == ID
    (back,) = causes(mirrored(tmp_path), ID)
    assert (back.side, back.names, back.parameters) == ("a", cause.names, cause.parameters)


def test_a_step_that_is_skipped_for_all_parameters_is_one_cause(compare: Compare) -> None:
    result = compare(b={"edit": instead(lambda before, _: before, names=(*A, *B))})

    (cause,) = causes(result, ID)
    assert set(cause.names) == {*A, *B}
    assert cause.summary.startswith("b does not update 6 of 6 parameters: 0 % is there of the update")
    assert ids(result) == [ID]


def test_a_weight_decay_that_is_all_that_is_applied(compare: Compare) -> None:
    kept = F32(1 - 1e-2 * 0.1)

    result = compare(weight_decay=0.1, b={"edit": instead(lambda before, _: before * kept)})

    (cause,) = causes(result, ID)
    assert cause.parameters is not None
    assert (cause.parameters["applied"], cause.parameters["decayed"]) == (0.0, True)
    assert "but for the weight decay" in cause.summary
    assert ids(result) == [ID]


def _one_element_kept(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    changed = after.copy()
    changed.flat[3] = before.flat[3]
    return changed


NEAR: dict[str, Instead] = {
    "half of it": lambda before, after: before + F32(0.5) * (after - before),
    "a fiftieth of it": lambda before, after: before + F32(0.02) * (after - before),
    "backwards": lambda before, after: before - (after - before),
    "twice": lambda before, after: before + F32(2) * (after - before),
    "all rows but one kept": lambda before, after: np.concatenate([before[:-1], after[-1:]]),
    "one element kept": _one_element_kept,
    "something else": lambda before, _: before * F32(1.001),
    "zeros": lambda before, _: np.zeros_like(before),
}


@pytest.mark.parametrize("name", NEAR)
def test_an_update_that_is_another_one_is_not_a_lost_one(name: str, compare: Compare) -> None:
    result = compare(b={"edit": instead(NEAR[name])})

    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.name) == (3, "param", A[1])
    assert not causes(result, ID)


@pytest.mark.parametrize("fault", ["bias_correction", "no_decay", "eps_inside"])
def test_another_rule_is_not_a_lost_update(fault: str, compare: Compare) -> None:
    assert not causes(compare(fault, eps=1e-3, weight_decay=0.1), ID)


def test_without_recorded_state_nothing_is_claimed(compare: Compare) -> None:
    what: Any = frozenset(set(Phase) - {Phase.OPT_STATE})

    result = compare("param_stuck", what=what)

    assert result.verdict is Verdict.DIVERGED
    assert not causes(result, ID)


def test_a_parameter_without_a_gradient_stays_and_is_no_divergence(compare: Compare) -> None:
    # While B is 0, A has no gradient: it stays as it is but for the decay.
    result = compare(weight_decay=0.0, steps=1)

    assert result.verdict is Verdict.SAME
    assert result.causes == ()
