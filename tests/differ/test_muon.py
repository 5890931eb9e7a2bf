"""Muon's iteration in bfloat16 is judged with much room, which what iterates in the dtype of the run is not given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from differ.align import Tensor
from differ.policy import default_policy
from differ.replay.optimizer import UpdateInputs
from differ.replay.rules import update_rules
from differ.replay.rules.base import Hyper, Rule
from differ.replay.rules.muon import BUFFER, newton_schulz

SHAPE = (64, 64)
HYPER = Hyper(lr=0.02, step=1, momentum=0.95, more={"ns_steps": 5.0})
BEFORE = (0.05 * np.random.default_rng(1).normal(size=SHAPE)).astype(np.float32)
GRADIENT = np.random.default_rng(2).normal(size=SHAPE).astype(np.float32)


class Kept:
    """What a trace holds of one matrix whose momentum is its gradient."""

    kinds = frozenset({BUFFER})
    gradient = Tensor(GRADIENT, "float32")
    parameter = Tensor(BEFORE, "float32")

    def state(self, _: str) -> Tensor:
        return self.gradient

    def earlier(self, _: str) -> Tensor:
        return self.gradient

    def remember(self, _: object, compute: Callable[[], Any]) -> Any:
        return compute()


def followed(*, rounded: bool, error: float = 0.0) -> set[str]:
    """How the rules iterate that a step follows, `error` of its size being wrong."""
    x = newton_schulz(GRADIENT.astype(np.float64), HYPER, rounded=rounded)
    wrong = np.random.default_rng(3).normal(size=SHAPE)
    x = x + error * np.linalg.norm(x) / np.linalg.norm(wrong) * wrong
    after = (BEFORE - HYPER.lr * x).astype(np.float32)
    rules: tuple[Rule, ...] = update_rules(Kept.kinds, HYPER)
    inputs = UpdateInputs(Tensor(BEFORE, "float32"), Tensor(after, "float32"), HYPER, Kept(), rules)
    return {dict(how)["iterated"] for how in rules if inputs.fit(how, default_policy().replay("float32")).ok}


@pytest.mark.parametrize(("rounded", "way"), [(True, "bfloat16"), (False, "full")])
def test_a_step_follows_its_own_iteration_only(rounded: bool, way: str) -> None:
    assert followed(rounded=rounded) == {way}


def test_a_wrong_step_has_no_rule_in_common_with_a_right_one() -> None:
    assert not followed(rounded=False, error=0.01) & followed(rounded=False)
