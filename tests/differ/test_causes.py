"""Causes: each is planted and named, and stays silent where it has nothing to say."""

from __future__ import annotations

from typing import Any

import pytest

from differ.result import Cause, DiffResult
from tests.differ.conftest import Compare


def causes(result: DiffResult, of: str) -> list[Cause]:
    return [cause for cause in result.causes if cause.id == of]


def test_layers_that_one_side_leaves_out_are_named(compare: Compare) -> None:
    (cause,) = causes(compare("init_names"), "init.names")

    assert cause.summary == "b adapts layers 1–2, a all 3"
    assert cause.side == "b"
    assert len(cause.names) == 2


def test_the_side_is_the_one_with_fewer_layers(compare: Compare) -> None:
    (cause,) = causes(compare(a={"layers": (1,)}), "init.names")

    assert cause.summary == "a adapts layers 1, b all 3"


def test_modules_that_one_side_leaves_out_are_named(compare: Compare) -> None:
    result = compare(b={"names": lambda name: name.replace("q_proj", "k_proj")})

    (cause,) = causes(result, "init.names")
    assert cause.summary in ("a adapts q_proj; b adapts k_proj", "b adapts k_proj; a adapts q_proj")


@pytest.mark.parametrize("fault", ["lr", "init_draw", "lora_scale", "grad_missing"])
def test_equal_sets_of_names_are_no_cause(fault: str, compare: Compare) -> None:
    assert causes(compare(fault), "init.names") == []


def test_a_setting_that_differs_is_shown_with_both_values(compare: Compare) -> None:
    (cause,) = causes(compare("lr"), "config.differs")

    assert cause.parameters == {"a": 0.01, "b": 0.0101}
    assert cause.explains is None


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("lr", "optimizer.lr"), ("clip_norm", "clip.mode"), ("batch_order", "data.order"), ("lora_scale", "lora.alpha")],
)
def test_the_setting_that_bears_on_the_first_finding_comes_first(fault: str, expected: str, compare: Compare) -> None:
    def declared(word: str) -> dict[str, Any]:
        keys = ("clip.mode", "data.order", "lora.alpha", "optimizer.lr", "zzz", "aaa")
        return {"declared": dict.fromkeys(keys, word)}

    result = compare(fault, a=declared("x"), b=declared("y"))

    assert causes(result, "config.differs")[0].names == (expected,)


def test_without_a_divergence_a_setting_that_differs_is_a_note(compare: Compare) -> None:
    result = compare(a={"declared": {"note": 1}}, b={"declared": {"note": 2}})

    assert result.causes == ()
    assert [note.summary for note in result.notes if note.id == "config.differs"] == ["note: a 1, b 2"]
