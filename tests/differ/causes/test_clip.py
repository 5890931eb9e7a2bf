"""Clipping: each rule is named with its constant, its tensors and its side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.builders import F32
from tests.differ.causes.plant import A, B, Edit, causes, edited, ids, mirrored, scaled, with_data
from tests.differ.conftest import Compare
from tracer.schema import Phase, Row


@pytest.mark.parametrize(
    ("clip", "limit"),
    [("value", 0.01), ("value", 0.05), ("norm", 0.02), ("norm", 0.1), ("tensor", 0.02), ("tensor", 0.1)],
)
def test_a_side_that_clips_is_named_with_its_rule_and_limit(clip: str, limit: float, compare: Compare) -> None:
    result = compare(b={"clip": clip, "clip_value": limit})

    (cause,) = causes(result, f"clip.{clip}")
    assert (cause.step, cause.phase, cause.side) == (1, "clipped_grad", "b")
    assert cause.parameters is not None
    assert cause.parameters["value"] == limit
    assert cause.explains is not None
    assert cause.explains > 0.9999
    assert cause.summary.endswith("; a does not clip")
    assert ids(result) == [f"clip.{clip}"]


def test_the_names_are_the_tensors_that_the_clip_changes(compare: Compare) -> None:
    result = compare(b={"clip": "value", "clip_value": 0.05})

    (cause,) = causes(result, "clip.value")
    # At the first step B is 0 and with it the gradient of A: nothing there to clip.
    assert set(cause.names) <= set(B)


@pytest.mark.parametrize("at", [1, 3])
def test_a_clip_that_sets_in_late_has_the_step_of_the_first_gradient_beyond_it(at: int, compare: Compare) -> None:
    burst = {"tamper": scaled(50.0, at=(at,), names="layers.1.self_attn.q_proj.lora_B")}

    result = compare(b={"clip": "value", "clip_value": 2.0}, **burst)

    (cause,) = causes(result, "clip.value")
    assert (cause.step, cause.names) == (at, (B[1],))


def test_the_sides_change_places_with_a_and_b(compare: Compare, tmp_path: Path) -> None:
    compare(a={"clip": "norm", "clip_value": 0.02}, b={"clip": "value", "clip_value": 0.01})

    (cause,) = causes(mirrored(tmp_path), "clip.value")
    assert cause.side == "a"
    assert cause.parameters == {
        "a": {"rule": "value", "value": 0.01},
        "b": {"rule": "norm", "value": 0.02},
        "value": 0.01,
    }
    assert cause.summary == "a clips each element to ±0.01; b clips by global norm at 0.02"


def test_a_side_that_declares_a_clip_and_does_not_clip_is_the_odd_one(compare: Compare) -> None:
    declared = {"declared": {"clip.mode": "norm", "clip.value": 0.02}}

    result = compare(a={"clip": "norm", "clip_value": 0.02}, **declared)

    (cause,) = causes(result, "clip.none")
    assert cause.side == "b"
    assert cause.summary == "b does not clip; a clips by global norm at 0.02"


def test_a_value_clip_in_place_of_the_declared_norm_clip_is_the_odd_one(compare: Compare) -> None:
    result = compare(
        a={"clip": "value", "clip_value": 0.01}, b={"clip": "norm", "clip_value": 0.02}, declared={"clip.mode": "norm"}
    )

    (cause,) = causes(result, "clip.value")
    assert cause.side == "a"


def test_two_limits_of_one_kind_are_shown_with_their_ratio(compare: Compare) -> None:
    result = compare(a={"clip": "norm", "clip_value": 0.02}, b={"clip": "norm", "clip_value": 0.04})

    (cause,) = causes(result, "clip.norm")
    assert cause.side is None
    assert cause.parameters is not None
    assert (cause.parameters["ratio"], cause.parameters["shards"]) == (2.0, 4)


def test_two_limits_whose_ratio_is_no_root_are_no_shards(compare: Compare) -> None:
    result = compare(a={"clip": "norm", "clip_value": 0.02}, b={"clip": "norm", "clip_value": 0.03})

    (cause,) = causes(result, "clip.norm")
    assert cause.parameters is not None
    assert "shards" not in cause.parameters


def test_sets_of_tensors_clipped_by_their_own_norms_are_shards(compare: Compare) -> None:
    result = compare(
        a={"clip": "norm", "clip_value": 0.1}, b={"edit": _shards(0.1, ((A[0], B[0]), (A[1], A[2], B[1], B[2])))}
    )

    (cause,) = causes(result, "clip.norm")
    assert cause.side == "b"
    assert cause.parameters == {"value": 0.1, "shards": 2, "a": {"rule": "norm", "value": 0.1}}
    assert set(cause.names) <= {*A, *B}
    assert set(B) <= set(cause.names)


@pytest.mark.parametrize(
    "both",
    [
        {"clip": "value", "clip_value": 0.01},
        {"clip": "norm", "clip_value": 0.02},
        {"clip": "tensor", "clip_value": 0.02},
    ],
)
def test_two_runs_under_one_clip_have_no_cause(both: dict[str, Any], compare: Compare) -> None:
    assert compare(**both).causes == ()


def test_a_gradient_that_differs_before_the_clip_is_not_a_clip(compare: Compare) -> None:
    result = compare(b={"tamper": scaled(1.5)}, clip="norm", clip_value=0.02)

    assert not [found for found in ids(result) if found.startswith("clip")]


def test_clipping_by_no_known_rule_is_not_called_a_clip(compare: Compare) -> None:
    assert not [found for found in ids(compare("clip_unknown")) if found.startswith("clip")]


def test_a_factor_between_gradient_and_optimizer_is_a_scale(compare: Compare) -> None:
    kept: dict[str, np.ndarray] = {}

    def edit(row: Row) -> Row | None:
        if row.phase is Phase.GRAD:
            kept.update({one.name: one.data for one in row.records if one.data is not None})
        if row.phase is not Phase.CLIPPED_GRAD:
            return row
        return edited(Phase.CLIPPED_GRAD, lambda one: with_data(one, kept[one.name] * F32(2)))(row)

    result = compare(b={"edit": edit})

    (cause,) = causes(result, "grad.scale")
    assert (cause.phase, cause.side) == ("clipped_grad", "b")
    assert cause.parameters is not None
    assert cause.parameters["factor"] == 2.0


def _shards(limit: float, sets: tuple[tuple[str, ...], ...]) -> Edit:
    """Clip each set of tensors by its own norm, in what is recorded."""
    gradients: dict[str, np.ndarray] = {}

    def edit(row: Row) -> Row | None:
        if row.phase is Phase.GRAD:
            gradients.update({one.name: one.data for one in row.records if one.data is not None})
        if row.phase is not Phase.CLIPPED_GRAD:
            return row
        factors = {}
        for members in sets:
            norm = float(np.sqrt(sum(float((gradients[name] ** 2).sum()) for name in members)))
            factors.update(dict.fromkeys(members, F32(min(1.0, limit / (norm + 1e-6)))))
        return edited(Phase.CLIPPED_GRAD, lambda one: with_data(one, gradients[one.name] * factors[one.name]))(row)

    return edit
