"""Settings of two optimizers are not each other's: which optimizers they are is said, and no setting is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from differ import Verdict
from tests.differ.causes.plant import causes, edited, ids, mirrored
from tests.differ.conftest import Compare
from tracer.schema import Phase

WITHOUT_DECAY = edited(Phase.HPARAMS, lambda one: None, name="weight_decay")


@pytest.mark.parametrize("a", [{}, {"momentum": 0.0}, {"weight_decay": 0.2}], ids=str)
def test_settings_of_another_optimizer_are_one_cause(a: dict[str, float], compare: Compare, tmp_path: Path) -> None:
    for result, words in (
        (compare(a={"optimizer": "sgd", **a}), "a follows SGD, b Adam"),
        (mirrored(tmp_path), "a follows Adam, b SGD"),
    ):
        assert result.first is not None
        assert (result.first.phase, ids(result)[0]) == ("hparams", "optimizer.rule")
        assert {*ids(result)} == {"optimizer.rule"}
        first = causes(result, "optimizer.rule")[0]
        assert (first.step, first.phase, first.summary, first.explains) == (1, "hparams", words, None)
        assert {"group0.beta1", "group0.beta2", "group0.eps"} <= set(first.names)
        assert len([cause for cause in result.causes if cause.summary == words]) == 1


def test_another_rate_of_another_optimizer_is_a_cause_of_its_own(compare: Compare) -> None:
    assert set(ids(compare(a={"optimizer": "sgd", "lr": 0.1}))) == {"schedule.lr", "optimizer.rule"}


def test_classes_tell_where_no_numbers_do(compare: Compare, tmp_path: Path) -> None:
    what = frozenset({Phase.INIT, Phase.HPARAMS})
    named = [{"observed": {"optimizer.class": name}} for name in ("Signum", "AdamW")]
    result = compare(a={"optimizer": "sgd", **named[0]}, b=named[1], what=what)

    (cause,) = causes(result, "optimizer.rule")
    assert cause.summary == "a's optimizer is Signum, b's AdamW"
    assert cause.parameters == {"a": "Signum", "b": "AdamW"}
    (cause,) = causes(mirrored(tmp_path), "optimizer.rule")
    assert cause.summary == "a's optimizer is AdamW, b's Signum"


@pytest.mark.parametrize(("named", "words"), [("Adam", "b has none"), ("Adamish", "b has none")])
def test_a_setting_that_one_side_of_one_optimizer_lacks_is_not_called_0(
    named: str, words: str, compare: Compare, tmp_path: Path
) -> None:
    observed = [{"observed": {"optimizer.class": name}} for name in ("AdamW", named)]
    result = compare(a=observed[0], b={**observed[1], "weight_decay": 0.0, "edit": WITHOUT_DECAY})

    assert {*ids(result)} == {"optimizer.weight_decay"}
    cause = causes(result, "optimizer.weight_decay")[0]
    assert cause.summary == f"weight decay: a 0.01, {words}"
    assert cause.parameters == {"setting": "weight_decay", "a": 0.01, "b": None}
    assert causes(mirrored(tmp_path), "optimizer.weight_decay")[0].summary == "weight decay: a has none, b 0.01"


# optimizer.groups


@pytest.mark.parametrize(("lr", "first"), [(1e-2, "group1.beta1"), (2e-2, "group0.lr")])
def test_another_number_of_groups_is_said_with_who_is_in_them(
    lr: float, first: str, compare: Compare, tmp_path: Path
) -> None:
    result = compare(b={"groups": True, "lr": lr})

    assert result.first is not None
    (cause,) = causes(result, "optimizer.groups")
    assert (cause.step, cause.phase, cause.parameters) == (1, "hparams", {"a": 1, "b": 2})
    assert cause.summary == (
        f"a has 1 group of parameters, b 2: b's group1 (lr {lr:g}) holds 3 of 6 parameters in layers 0–2"
    )
    assert set(cause.names) == {f"group1.{key}" for key in ("lr", "weight_decay", "beta1", "beta2", "eps")}
    assert set(ids(result)) == {"optimizer.groups"} | ({"schedule.lr"} if first == "group0.lr" else set())
    (cause,) = causes(mirrored(tmp_path), "optimizer.groups")
    assert cause.summary.startswith("a has 2 groups of parameters, b 1: a's group1 ")


def test_the_same_groups_are_no_cause(compare: Compare) -> None:
    assert compare(groups=True).verdict is Verdict.SAME
    assert not causes(compare(groups=True, b={"lr": 2e-2}), "optimizer.groups")
