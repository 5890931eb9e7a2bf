"""Runs that train something else than their author thinks: what the recorder sees of them, and says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tracer.dtypes import to_float64
from tracer.reader import Trace, open_trace
from tracer.schema import Phase, State

pytest.importorskip("torch", reason="needs the extra `torch`")
pytest.importorskip("peft", reason="needs peft")

PROGRAM = Path(__file__).parents[1] / "programs" / "torch_gaps.py"
LORA = [f"model.layers.0.self_attn.q_proj.lora_{factor}.weight" for factor in "AB"]
RECORDED = (
    "after_peft",
    "before_peft",
    "before_peft_of_a_frozen_base",
    "half_held",
    "detached",
    "zeroed_too_early",
    "idle_beside_another",
    "autocast_around",
    "autocast_inside",
    "autocast_in_evaluation_only",
    "evaluated_in_between",
    "left_in_evaluation",
    "always_in_evaluation",
    "partly_in_evaluation",
    "wrapped_before",
    "wrapped_later",
    "wrapped_later_and_unheld",
    "held_beside",
)

Runs = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("gaps")
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def names(trace: Trace, phase: Phase, step: int) -> list[str]:
    view = trace.row(phase, step)
    return [] if view is None else [e.name for e in view.layout.entries if not e.name.startswith("rng.")]


def states(trace: Trace, phase: Phase, step: int) -> set[State]:
    view = trace.row(phase, step)
    return set() if view is None else {State(int(state)) for state in view.states}


def value(trace: Trace, phase: Phase, step: int, name: str) -> Any:
    view = trace.row(phase, step)
    assert view is not None, f"no {phase.label} at step {step}"
    i = view.layout.positions[name]
    return to_float64(view.read(i), view.layout.entries[i].dtype)


def modes(trace: Trace) -> list[float | None]:
    """`reported.model.training` of each step; None where there is none."""
    name = "reported.model.training"
    return [
        float(value(trace, Phase.HPARAMS, step, name)) if name in names(trace, Phase.HPARAMS, step) else None
        for step in trace.steps[1:]
    ]


def test_no_bit_of_a_run_changes_and_no_hook_stays(runs: Runs) -> None:
    said = dict(runs[1])
    assert said.pop("hooks") == 0
    assert [name for name, run in said.items() if run["plain"] != run["recorded"] or run["failure"]] == []
    assert {name for name, run in said.items() if not run["error"]} == set(RECORDED)


# What the optimizer holds.


@pytest.mark.parametrize("name", ["before_peft", "before_peft_of_a_frozen_base"])
def test_steps_of_an_optimizer_made_before_the_adapters_are_recorded(runs: Runs, name: str) -> None:
    with open_trace(runs[0] / f"{name}.h5") as early, open_trace(runs[0] / "after_peft.h5") as twin:
        assert early.steps == twin.steps == (0, 1, 2)
        for phase, step in ((Phase.INIT, 0), (Phase.HPARAMS, 1), (Phase.GRAD, 1), (Phase.PARAM, 1)):
            assert names(early, phase, step) == names(twin, phase, step)
        for step in (1, 2):
            assert early.micro_batches(Phase.LOSS, step) == early.micro_batches(Phase.BATCH, step) == (0,)
            # Nothing moves it.
            assert np.array_equal(value(early, Phase.PARAM, step, LORA[0]), value(early, Phase.INIT, 0, LORA[0]))
        assert np.array_equal(value(early, Phase.GRAD, 1, LORA[1]), value(twin, Phase.GRAD, 1, LORA[1]))
        assert not np.array_equal(value(twin, Phase.PARAM, 1, LORA[1]), value(twin, Phase.INIT, 0, LORA[1]))
        # The optimizer was given nothing, which is not the same as not having been clipped.
        assert Phase.CLIPPED_GRAD not in early.phases
        assert "clip.mode" not in early.observed
        assert (early.observed["optimizer.unheld"], twin.observed["optimizer.unheld"]) == (2, 0)
        assert early.observed["optimizer.unheld.names"] == LORA
        assert "optimizer.unheld.names" not in twin.observed


def test_parameters_that_no_optimizer_holds_are_named_and_their_values_recorded(runs: Runs) -> None:
    with open_trace(runs[0] / "half_held.h5") as half:
        assert (half.observed["optimizer.unheld"], half.observed["optimizer.unheld.names"]) == (1, LORA[1:])
        assert names(half, Phase.PARAM, 2) == LORA
        assert names(half, Phase.CLIPPED_GRAD, 2) == LORA[:1]
        assert half.observed["clip.mode"] == "none"
    with open_trace(runs[0] / "wrapped_later_and_unheld.h5") as late:
        assert late.observed["optimizer.unheld.names"] == ["1.weight", "1.bias"]
        assert {"1.weight", "1.bias"} <= set(names(late, Phase.INIT, 0)) & set(names(late, Phase.PARAM, 3))


def test_a_step_that_follows_a_backward_without_a_gradient_is_recorded(runs: Runs) -> None:
    with open_trace(runs[0] / "detached.h5") as detached, open_trace(runs[0] / "zeroed_too_early.h5") as zeroed:
        assert detached.steps == zeroed.steps == (0, 1, 2)
        assert states(detached, Phase.GRAD, 1) == states(detached, Phase.CLIPPED_GRAD, 1) == {State.NONE}
        assert State.VALUE in states(zeroed, Phase.GRAD, 1)
        assert states(zeroed, Phase.CLIPPED_GRAD, 1) == {State.NONE}


def test_an_update_without_a_gradient_is_no_step_beside_one_with_or_before_any_backward(runs: Runs) -> None:
    with open_trace(runs[0] / "idle_beside_another.h5") as trace:
        assert trace.steps == (0, 1, 2)
        assert names(trace, Phase.CLIPPED_GRAD, 1) == names(trace, Phase.PARAM, 1) == ["1.weight", "1.bias"]
        assert trace.observed["optimizer.unheld"] == 0


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("never_differentiated", "2 optimizer steps were seen, none with a gradient; no backward was seen;"),
        (
            "nothing_held_nor_differentiated",
            "2 optimizer steps were seen, none with a gradient; the optimizer holds 0 of 2 trainable tensors;",
        ),
        (
            "all_frozen",
            "2 optimizer steps were seen, none with a gradient; all 12 tensors of the optimizer are frozen;",
        ),
        ("always_overflowing", "2 optimizer steps were seen, skipped for an inf or nan in the scaled gradients;"),
    ],
)
def test_where_no_step_can_be_kept_the_error_says_what_was_seen(runs: Runs, name: str, seen: str) -> None:
    error = runs[1][name]["error"]
    assert error.startswith(f"{name}.h5: {seen}")
    assert error.endswith("[nothing-recorded]")


# Autocast and modes.


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("after_peft", "none"),
        ("autocast_around", "bfloat16"),
        ("autocast_inside", "bfloat16"),
        ("autocast_in_evaluation_only", "none"),
    ],
)
def test_autocast_is_observed_whether_it_is_on_or_off(runs: Runs, name: str, dtype: str) -> None:
    with open_trace(runs[0] / f"{name}.h5") as trace:
        assert trace.observed["autocast"] == dtype


@pytest.mark.parametrize(
    ("name", "mode", "of_steps"),
    [
        ("autocast_around", True, [None, None, None]),
        ("evaluated_in_between", True, [None, None, None]),
        ("left_in_evaluation", True, [None, 0.0, 0.0]),
        ("always_in_evaluation", False, [None, None, None]),
        ("partly_in_evaluation", "mixed", [None, None, None]),
    ],
)
def test_the_mode_of_what_is_differentiated_is_observed(
    runs: Runs, name: str, mode: bool | str, of_steps: list[float | None]
) -> None:
    with open_trace(runs[0] / f"{name}.h5") as trace:
        assert trace.observed["model.training"] == mode
        assert modes(trace) == of_steps


# Names.


def test_a_model_that_is_wrapped_after_its_optimizer_was_made_has_the_names_of_the_wrapper(runs: Runs) -> None:
    with open_trace(runs[0] / "wrapped_later.h5") as later, open_trace(runs[0] / "wrapped_before.h5") as before:
        assert names(before, Phase.INIT, 0) == [
            "0.up.weight",
            "0.up.bias",
            "0.down.weight",
            "0.down.bias",
            "1.weight",
            "1.bias",
        ]
        for phase, step in ((Phase.INIT, 0), (Phase.GRAD, 1), (Phase.PARAM, 3)):
            assert names(later, phase, step) == names(before, phase, step)
        for step in (1, 2):
            row = later.row(Phase.BATCH, step, 0)
            assert row is not None
            assert [entry.name for entry in row.layout.entries] == ["input"]


def test_parameters_of_other_modules_and_of_none_have_names_and_a_start(runs: Runs) -> None:
    own = ["up.weight", "up.bias", "down.weight", "down.bias"]
    with open_trace(runs[0] / "held_beside.h5") as trace:
        expected = [*own, "model1.weight", "model1.bias", "optimizer0.parameter6"]
        assert names(trace, Phase.INIT, 0) == names(trace, Phase.PARAM, 3) == expected
        assert states(trace, Phase.INIT, 0) == {State.VALUE}
        # The calls of both are seen, in every step.
        assert trace.observed["model.training"] is True
        assert trace.micro_batches(Phase.BATCH, 1) == trace.micro_batches(Phase.BATCH, 3) == (0, 1)
