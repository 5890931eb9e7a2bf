"""Every known optimizer of both frameworks is replayed from real runs: clean it follows, and 1 % off it is found, whatever
differs before.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from differ import DiffResult, Finding, diff

ROOT = Path(__file__).parents[2]

TORCH = [
    *("sgd", "sgd-momentum", "sgd-nesterov", "sgd-dampening", "adam", "amsgrad", "adamax", "nadam", "radam", "rmsprop"),
    *(
        "rmsprop-centered",
        "adagrad",
        "adagrad-zero",
        "adadelta",
        "adafactor",
        "adafactor-hf",
        "adafactor-hf-lr",
        "muon",
        "muon-adamw",
    ),
]
MLX = [
    *("sgd", "sgd-momentum", "sgd-nesterov", "sgd-dampening", "adamax", "rmsprop", "adagrad", "adadelta", "lion"),
    *("adafactor", "adafactor-lr", "muon", "muon-plain"),
]
CLEAN = [("torch", name) for name in TORCH] + [("mlx", name) for name in MLX]
PLANTED = [
    ("torch", "sgd@lr", "param"),
    ("torch", "sgd-momentum@momentum", "opt_state"),
    ("torch", "sgd-momentum@weight_decay", "opt_state"),
    ("torch", "sgd-dampening@dampening", "opt_state"),
    ("torch", "sgd-nesterov@lr", "param"),
    ("torch", "amsgrad@lr", "param"),
    ("torch", "adamax@lr", "param"),
    ("torch", "adamax@betas", "opt_state"),
    ("torch", "nadam@lr", "param"),
    ("torch", "nadam@momentum_decay", "opt_state"),
    ("torch", "radam@lr", "param"),
    ("torch", "rmsprop@alpha", "opt_state"),
    ("torch", "rmsprop@lr", "param"),
    ("torch", "rmsprop-centered@momentum", "opt_state"),
    ("torch", "adagrad@lr", "param"),
    ("torch", "adagrad@lr_decay", "param"),
    ("torch", "adadelta@rho", "opt_state"),
    ("torch", "adadelta@lr", "param"),
    ("torch", "adafactor@lr", "param"),
    ("torch", "adafactor@beta2_decay", "opt_state"),
    ("torch", "adafactor-hf@decay_rate", "opt_state"),
    ("torch", "adafactor-hf-lr@lr", "opt_state"),
    ("torch", "muon@lr", "param"),
    ("torch", "muon@momentum", "opt_state"),
    ("mlx", "sgd@learning_rate", "param"),
    ("mlx", "adamax@betas", "opt_state"),
    ("mlx", "rmsprop@alpha", "opt_state"),
    ("mlx", "adagrad@learning_rate", "param"),
    ("mlx", "adadelta@rho", "opt_state"),
    ("mlx", "lion@learning_rate", "param"),
    ("mlx", "lion@betas", "opt_state"),
    ("mlx", "adafactor@decay_rate", "opt_state"),
    ("mlx", "muon@learning_rate", "param"),
    ("mlx", "muon@momentum", "opt_state"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`torch/` and `mlx/`, each with the traces of all cases, made by one process."""
    root = tmp_path_factory.mktemp("optimizers")
    for framework, names in (("torch", TORCH), ("mlx", MLX)):
        planted = [case for where, case, _ in PLANTED if where == framework]
        cases = [*names, *(f"{name}@" for name in names), *planted]
        (root / framework).mkdir()
        program = ROOT / "tests" / "programs" / f"{framework}_optimizers.py"
        command = [sys.executable, "-W", "ignore", str(program), str(root / framework), *cases]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    return root


def updates(result: DiffResult) -> list[Finding]:
    return [finding for finding in result.findings if finding.phase in ("opt_state", "param")]


def unknown(result: DiffResult) -> list[str]:
    return [note.summary for note in result.notes if note.id in ("rule.unknown", "rule.unrecorded")]


@pytest.mark.parametrize(("framework", "case"), CLEAN)
def test_an_optimizer_follows_its_rule_though_its_inputs_are_others(framework: str, case: str, folder: Path) -> None:
    result = diff(folder / framework / f"{case}.h5", folder / framework / f"{case}@.h5")

    assert result.first is not None
    assert result.first.phase == "init"
    assert updates(result) == []
    assert unknown(result) == []
    judged = result.counts.within
    assert judged >= 3 * 2


@pytest.mark.parametrize(("framework", "case", "phase"), PLANTED)
def test_one_percent_inside_the_update_is_found_where_it_is(
    framework: str, case: str, phase: str, folder: Path
) -> None:
    clean = folder / framework / f"{case.partition('@')[0]}.h5"
    result = diff(clean, folder / framework / f"{case}.h5")

    found = updates(result)
    assert [finding.phase for finding in found][:1] == [phase]
    assert found[0].detail.startswith("a follows from its own inputs; b does not follow"), found[0].detail
    assert found[0].step <= 2

    mirrored = updates(diff(folder / framework / f"{case}.h5", clean))
    assert [(one.step, one.phase, one.name) for one in mirrored] == [(one.step, one.phase, one.name) for one in found]


def test_two_optimizers_that_keep_the_same_state_are_told_apart(folder: Path) -> None:
    result = diff(folder / "torch" / "adam.h5", folder / "torch" / "radam.h5")

    cause = next(cause for cause in result.causes if cause.id == "optimizer.rule")
    assert (cause.step, cause.phase, cause.summary) == (1, "param", "a follows AdamW, b RAdam")
    assert cause.explains is not None
    assert cause.explains > 0.99


@pytest.mark.parametrize(
    ("other", "word"), [("adafactor-hf", "Adafactor"), ("sgd-momentum", "SGD"), ("rmsprop", "RMSprop")]
)
def test_two_optimizers_are_the_first_cause_of_settings_that_only_one_has(other: str, word: str, folder: Path) -> None:
    adam, path = folder / "torch" / "adam.h5", folder / "torch" / f"{other}.h5"
    for result, words in (
        (diff(adam, path), f"a follows AdamW, b {word}"),
        (diff(path, adam), f"a follows {word}, b AdamW"),
    ):
        causes = [cause for cause in result.causes if cause.phase == "hparams" and cause.id != "schedule.lr"]
        assert [(cause.id, cause.summary) for cause in causes] == [("optimizer.rule", words)]


def test_momentum_is_not_taken_for_another_optimizer_s(folder: Path) -> None:
    result = diff(folder / "torch" / "muon.h5", folder / "torch" / "muon-adamw.h5")

    notes = {
        note.side: dict(note.parameters or {}) for note in result.notes if note.id == "rule" and note.phase == "param"
    }
    assert notes == {"a": {"nesterov": "yes", "size": "original"}, "b": {"nesterov": "no", "size": "adamw"}}


def test_state_that_one_framework_makes_before_the_first_step_is_no_divergence(folder: Path) -> None:
    result = diff(folder / "torch" / "adagrad-zero.h5", folder / "mlx" / "adagrad.h5")

    assert updates(result) == []
    assert unknown(result) == []
