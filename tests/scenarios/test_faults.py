"""PyTorch against MLX from shared adapters and batches: same settings are `same`, one changed setting is found where it is.

The same pair with one setting changed on one side, one at a time: the diff must name the step, the phase and, where
there is one, the parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from differ import DiffResult, Verdict, diff
from tests.scenarios.conftest import FAULT_STEPS, SOURCES, Once, arm, needs_mlx, needs_torch, paths_of, record_all

pytestmark = [needs_torch, needs_mlx]


@dataclass(frozen=True)
class Fault:
    """One changed setting, and where the first finding must be: `name` is how its record's name begins or ends."""

    settings: Mapping[str, Any]
    step: int
    phase: str
    begins: str = ""
    ends: str = ""
    source: str = "tiny-llama"
    own_batches: bool = False


FAULTS = {
    "bias correction": Fault({"optimizer.bias_correction": False}, 1, "param", "model.layers.", ".lora_B.weight"),
    "clip by value": Fault(
        {"clip.mode": "value", "clip.value": 0.01}, 1, "clipped_grad", "model.layers.", ".lora_B.weight"
    ),
    "clip by norm": Fault(
        {"clip.mode": "norm", "clip.value": 0.1}, 1, "clipped_grad", "model.layers.", ".lora_B.weight"
    ),
    "3 of 4 layers": Fault({"lora.layers": 3}, 0, "init", "model.layers.0."),
    "16 of 18 layers": Fault({"lora.layers": 16}, 0, "init", "model.layers.0.", source="gemma"),
    "alpha": Fault({"lora.alpha": 32}, 0, "init", "model.layers.", ".lora_scale"),
    "lr": Fault({"optimizer.lr": 1.01e-3}, 1, "hparams", "group0.lr"),
    "weight decay": Fault({"optimizer.weight_decay": 0.1}, 1, "hparams", "group0.weight_decay"),
    "data order": Fault({"data.order": "shuffled"}, 1, "batch", own_batches=True),
    "label": Fault({"data.mask_label": [1, 4]}, 1, "batch", "labels"),
    "label of step 2": Fault({"data.mask_label": [0, 3], "data.mask_step": 2}, 2, "batch", "labels"),
    "dtype of the base": Fault({"model.dtype": "bfloat16"}, 0, "init", "model."),
}
SAME = ("tiny-llama", "long", "tiny-gemma3-64")


@pytest.fixture(scope="session")
def traces(sources: dict[str, Path], once: Once) -> dict[str, Path]:
    """Recorded MLX runs: one per fault, the same settings on each model, and both places of the seed."""
    arms = {}
    for name, fault in FAULTS.items():
        settings = {**SOURCES[fault.source], **fault.settings}
        arms[name] = arm(settings, source=sources[fault.source], batches=not fault.own_batches)
    for name in (*SAME, "tiny-gemma3-96"):
        arms[name] = arm(SOURCES[name], source=sources[name])
    for place in ("before-load", "after-load"):
        arms[place] = arm({"train.steps": FAULT_STEPS, "train.seed_at": place})
    arms["again"] = arms["after-load"]
    return paths_of(once("faults", lambda folder: record_all("mlx", arms, folder))[1])


@pytest.mark.parametrize("name", SAME)
def test_the_same_settings_on_both_frameworks_are_the_same(
    name: str, sources: dict[str, Path], traces: dict[str, Path]
) -> None:
    result = diff(sources[name], traces[name])
    assert result.verdict is Verdict.SAME, result.first
    assert result.counts.steps == SOURCES[name]["train.steps"]
    assert result.counts.compared > 900
    assert result.margin < 1.0


@pytest.mark.parametrize("name", FAULTS)
def test_one_changed_setting_is_found_where_it_is(name: str, sources: dict[str, Path], traces: dict[str, Path]) -> None:
    fault = FAULTS[name]
    result = diff(sources[fault.source], traces[name])
    assert result.verdict is Verdict.DIVERGED
    assert_first(result, fault.step, fault.phase)
    assert result.first is not None
    assert result.first.name is not None
    assert result.first.name.startswith(fault.begins)
    assert result.first.name.endswith(fault.ends)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_whichever_side_it_is_on(name: str, sources: dict[str, Path], traces: dict[str, Path]) -> None:
    fault = FAULTS[name]
    result = diff(traces[name], sources[fault.source])
    assert_first(result, fault.step, fault.phase)


def test_the_rounded_embedding_scale_of_gemma_is_found_at_step_1(
    sources: dict[str, Path], traces: dict[str, Path]
) -> None:
    result = diff(sources["tiny-gemma3-96"], traces["tiny-gemma3-96"])
    assert result.verdict is Verdict.DIVERGED
    assert_first(result, 1, "loss")


def test_the_seed_set_before_loading_is_another_draw(traces: dict[str, Path]) -> None:
    result = diff(traces["after-load"], traces["before-load"])
    assert_first(result, 0, "init")
    assert result.first is not None
    assert result.first.name is not None
    assert result.first.name.endswith(".lora_A.weight")


def test_the_same_run_again_is_the_same_to_the_bit(traces: dict[str, Path]) -> None:
    result = diff(traces["after-load"], traces["again"])
    assert result.verdict is Verdict.SAME
    assert result.counts.same_bits == result.counts.compared > 900


def assert_first(result: DiffResult, step: int, phase: str) -> None:
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (step, phase)
