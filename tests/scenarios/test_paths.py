"""The training paths: each runs, twice the same, does what its configuration says and refuses what it cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scenarios.launch import Arm, RunFailed, run
from tests.scenarios.conftest import FED, Once, arm, needs_mlx, needs_torch, run_many, run_paths
from tracer.reader import open_trace
from tracer.schema import Phase

pytestmark = [needs_torch, needs_mlx]

PAIR = {"lora.dropout": 0.1, "train.accumulation": 2}
ARMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pair": PAIR,
    "pair again": PAIR,
    "pair, other seed": {**PAIR, "train.seed": 1},
    "clip by value": {"clip.mode": "value", "clip.value": 1e-3},
    "clip by norm": {"clip.mode": "norm", "clip.value": 1e-3},
    "clip by tensor": {"clip.mode": "tensor", "clip.value": 1e-3},
    "scale": {"lora.scale": 5.0},
    "wider": {"data.pad_extra": 3},
    "checkpointed": {"train.checkpointing": True},
    "no bias correction": {"optimizer.bias_correction": False},
    "adam": {"optimizer.name": "adam", "optimizer.eps": 1e-3},
    "sgd": {"optimizer.name": "sgd"},
    "cosine": {"optimizer.schedule": "cosine"},
    "warm-up": {"optimizer.schedule": "linear", "optimizer.warmup": 1},
    "bfloat16": {"model.dtype": "bfloat16"},
    "library batches": {"data.batching": "library"},
    "eager": {"train.compile": False, "train.device": "cpu"},
    "three layers": {"lora.layers": 3},
    "one target": {"lora.targets": ["q_proj"]},
    "linear targets": {"lora.targets": "linear"},
    # Nothing moves at a rate of 0: what the run ends with is what it drew.
    "drawn after load": {"optimizer.lr": 0, "train.seed_at": "after-load"},
    "drawn before load": {"optimizer.lr": 0, "train.seed_at": "before-load"},
}
# What changes nothing, or only rounding, in some path.
NEUTRAL = ("plain", "eager", "linear targets", "library batches", "pair again", "wider", "checkpointed")
CHANGES = [name for name in ARMS if name not in NEUTRAL]
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def results(once: Once) -> dict[str, Results]:
    """Outcome of every arm on every path."""
    arms = {name: arm({"train.steps": 2, **settings}) for name, settings in ARMS.items()}
    found: dict[str, Results] = once("paths", lambda folder: run_paths(FED, arms, folder))[1]
    return found


def parameters(results: Results, name: str) -> str:
    return str(results[name]["digests"]["parameters"])


@pytest.mark.parametrize("path", FED)
def test_a_path_ends_with_the_same_bits_twice(path: str, results: dict[str, Results]) -> None:
    first, second = results[path]["pair"], results[path]["pair again"]
    assert first == second
    assert len(first["losses"]) == 4
    assert all(np.isfinite(first["losses"]))


@pytest.mark.parametrize("path", FED)
def test_every_setting_reaches_the_library(path: str, results: dict[str, Results]) -> None:
    plain = parameters(results[path], "plain")
    assert [name for name in CHANGES if parameters(results[path], name) == plain] == []


@pytest.mark.parametrize("path", ["hf-trainer", "trl-sft", "mlx-lm"])
def test_a_librarys_own_batches_are_others_than_the_plain_ones(path: str, results: dict[str, Results]) -> None:
    assert parameters(results[path], "library batches") != parameters(results[path], "plain")


@pytest.mark.parametrize("path", ["torch", "mlx"])
def test_a_hand_written_loop_batches_plainly(path: str, results: dict[str, Results]) -> None:
    assert parameters(results[path], "library batches") == parameters(results[path], "plain")


@pytest.mark.parametrize("path", FED)
def test_the_adapters_are_where_the_configuration_says(path: str, results: dict[str, Results]) -> None:
    counts = {
        name: results[path][name]["parameters"] for name in ("plain", "three layers", "one target", "linear targets")
    }
    assert counts == {"plain": 56, "three layers": 42, "one target": 8, "linear targets": 56}


def test_mlx_lms_trainer_and_the_hand_written_loop_end_with_the_same_bits(results: dict[str, Results]) -> None:
    same = [name for name in ARMS if name not in ("library batches", "bfloat16")]
    assert all(results["mlx-lm"][name]["digests"] == results["mlx"][name]["digests"] for name in same)
    # mlx-lm's loss stays in bfloat16 where the loop's goes to float32.
    assert parameters(results["mlx-lm"], "bfloat16") != parameters(results["mlx"], "bfloat16")


def test_compiled_and_eager_are_the_same_on_one_processor(results: dict[str, Results]) -> None:
    assert parameters(results["mlx"], "eager") == parameters(results["mlx"], "plain")


@pytest.mark.parametrize("path", FED)
def test_wider_padding_and_checkpointing_leave_the_losses_as_they_are(path: str, results: dict[str, Results]) -> None:
    plain = results[path]["plain"]["losses"]
    for name in ("wider", "checkpointed"):
        assert np.allclose(results[path][name]["losses"], plain, rtol=1e-5)


@pytest.mark.parametrize(("path", "moves"), [(path, path.startswith("mlx")) for path in FED])
def test_the_place_of_the_seed_moves_the_draw_in_mlx_only(path: str, moves: bool, results: dict[str, Results]) -> None:
    """Every layer that MLX builds draws random numbers; transformers loads without drawing any."""
    before, after = (parameters(results[path], f"drawn {place} load") for place in ("before", "after"))
    assert (before != after) is moves


def adapters(file: Path) -> dict[str, npt.NDArray[Any]]:
    with open_trace(file) as trace:
        row = trace.row(Phase.INIT, 0)
        assert row is not None
        entries = enumerate(row.layout.entries)
        return {e.name: row.read(i) for i, e in entries if ".lora_" in e.name and e.name.endswith(".weight")}


def batches(file: Path) -> list[npt.NDArray[Any]]:
    with open_trace(file) as trace:
        rows = [trace.row(Phase.BATCH, s, m) for s in trace.steps for m in trace.micro_batches(Phase.BATCH, s)]
        names = ("input_ids", "labels", "tokens")
        return [row.read(row.layout.positions[name]) for row in rows if row is not None for name in names]


@pytest.mark.parametrize("path", ["hf-trainer", "trl-sft", "mlx-lm", "mlx"])
def test_init_from_and_batches_from_are_exact(path: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, own, fed = sources["accumulated"], tmp_path / "own.h5", tmp_path / "fed.h5"
    settings = {"train.steps": 3, "train.accumulation": 2, "train.seed": 5}
    run_many(path, {"fed": arm(settings, trace=fed, source=source), "own": arm(settings, trace=own)}, tmp_path)
    given, taken = adapters(source), adapters(fed)
    assert sorted(given) == sorted(taken)
    assert all(np.array_equal(given[name], taken[name]) for name in given)
    assert not any(np.array_equal(given[name], data) for name, data in adapters(own).items() if ".lora_A" in name)
    pairs = list(zip(batches(source), batches(fed), strict=True))
    assert len(pairs) == 3 * 2 * 3
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert not all(np.array_equal(a, b) for a, b in zip(batches(source), batches(own), strict=True))


FITTING = {"train.steps": 3, "train.accumulation": 2}
REFUSED: dict[str, dict[str, tuple[dict[str, Any], str]]] = {
    "mlx": {
        "micro-batches": ({"train.accumulation": 3}, "set train.accumulation = 2"),
        "steps": ({"train.steps": 9}, "has no batches for step 4"),
        "rank": ({"lora.rank": 4}, "this run needs"),
        "decay": ({"optimizer.name": "adam", "optimizer.weight_decay": 0.1}, "MLX's Adam has none"),
        "target": ({"lora.targets": ["c_attn"]}, "no layer of this model has c_attn"),
        "mask": ({"data.mask_label": [1, 0]}, "not a supervised position of step 1"),
        "attention": ({"model.attention": "eager"}, "MLX has one implementation"),
        "autocast": ({"train.autocast": "bfloat16"}, "MLX has no autocast"),
        "validation": ({"train.validate_every": 1}, "this loop does not validate"),
        "data seed": ({"train.data_seed": 1}, 'use data.batching = "library"'),
    },
    "mlx-lm": {
        "reduction": ({"loss.reduction": "token-mean"}, "averages micro-batches unweighted"),
        "precision": ({"loss.precision": "float32", "model.dtype": "bfloat16"}, "in the dtype of the logits"),
    },
    "mlx-lm-cli": {
        "batches": ({}, "makes its own batches"),
    },
    "trl-sft": {
        "reduction": ({"loss.reduction": "mean-of-means"}, "weights every token of a step equally"),
        "parts": ({"parts.loss": "mlx"}, "no parts to exchange"),
    },
    "torch": {
        "rank": ({"lora.rank": 4}, "this run needs"),
        "target": ({"lora.targets": ["c_attn"]}, "PEFT does not accept this adapter"),
    },
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_does_not_fit_is_refused_and_says_what_would(path: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, cases = sources["accumulated"], REFUSED[path]
    found = run_many(path, {n: arm({**FITTING, **s}, source=source) for n, (s, _) in cases.items()}, tmp_path)
    assert {name: said in found[name].get("error", "") for name, (_, said) in cases.items()} == dict.fromkeys(
        cases, True
    )


def test_a_bad_run_ends_with_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scenarios.run", "pytorch"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "trace: there is no path called pytorch; known are torch, hf-trainer, trl-sft, mlx-lm, mlx-lm-cli, mlx, unsloth-mlx "
        "[usage]"
    ]
    with pytest.raises(RunFailed, match="known are torch"):
        run(Arm("pytorch", {}), tmp_path / "outcome.json")
