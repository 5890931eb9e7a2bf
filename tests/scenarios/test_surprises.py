"""What surprises in the real libraries is found by a diff at its address; each has a clean twin beside it.

The runs that need unsloth_zoo take it from an environment of its own; without one they are skipped, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from differ import DiffResult, Verdict, diff
from tests.scenarios.conftest import (
    UNSLOTH,
    Once,
    arm,
    needs_mlx,
    needs_torch,
    needs_unsloth,
    paths_of,
    record_all,
    run_many,
)
from tracer.reader import open_trace
from tracer.schema import REPORTED_PREFIX, Phase

pytestmark = [needs_torch, needs_mlx]

ONE_BATCH = {"train.steps": 1, "data.rows": 2, "data.batching": "library"}
CLI = {
    "one batch": ONE_BATCH,
    "file order": {"train.steps": 2, "data.rows": 8},
    "file order again": {"train.steps": 2, "data.rows": 8},
    "sorted": {"train.steps": 2, "data.rows": 8, "data.order": "length"},
    "no validation": {"train.steps": 18},
    "no validation again": {"train.steps": 18},
    "validation": {"train.steps": 18, "train.validate_every": 100},
    "no bias correction": {"train.steps": 10, "data.rows": 8, "optimizer.bias_correction": False},
    "bias correction": {"train.steps": 10, "data.rows": 8},
}


@pytest.fixture(scope="session")
def cli(once: Once) -> dict[str, Path]:
    """Runs of `python -m mlx_lm lora`."""
    arms = {name: arm(settings) for name, settings in CLI.items()}
    return paths_of(once("surprises-cli", lambda folder: record_all("mlx-lm-cli", arms, folder))[1])


def found(result: DiffResult) -> tuple[int, str, str]:
    assert result.first is not None
    return result.first.step, result.first.phase, str(result.first.name)


def causes(result: DiffResult) -> dict[str, Mapping[str, Any]]:
    return {cause.id: cause.parameters for cause in result.causes}


def tokens(file: Path) -> int:
    with open_trace(file) as trace:
        row = trace.row(Phase.BATCH, 1, 0)
        assert row is not None
        return int(row.read(row.layout.positions["tokens"]))


def test_mlx_lm_supervises_one_padding_of_every_row(cli: dict[str, Path], tmp_path: Path) -> None:
    """1: its mask includes the position behind the last token.  The twin: a PyTorch run that is told to do so too."""
    source = cli["one batch"]
    with open_trace(source) as trace:
        row = trace.row(Phase.BATCH, 1, 0)
        assert row is not None
        width = row.layout.entries[row.layout.positions["input_ids"]].shape[1]
    settings = {"train.steps": 1, "data.rows": 2}
    wide = {**settings, "data.pad_extra": width - longest(source)}
    arms = {
        "plain": arm(wide, source=source, batches=False),
        "told": arm({**wide, "data.supervise": "tokens-and-pad"}, source=source, batches=False),
    }
    torch = paths_of(record_all("torch", arms, tmp_path))
    result = diff(torch["plain"], source)
    assert result.verdict is Verdict.DIVERGED
    assert found(result) == (1, "batch", "labels")
    assert "batch.mask" in causes(result)
    assert tokens(source) == tokens(torch["plain"]) + 2
    assert diff(torch["told"], source).verdict is Verdict.SAME


def longest(file: Path) -> int:
    """Width of the longest row of the first batch: the last supervised position is the padding behind it."""
    with open_trace(file) as trace:
        row = trace.row(Phase.BATCH, 1, 0)
        assert row is not None
        labels = row.read(row.layout.positions["labels"])
    return int((labels != -100).any(axis=0).nonzero()[0].max())


def test_mlx_lm_does_not_sort_by_length(cli: dict[str, Path]) -> None:
    """2: a loader that sorts would make the same batches of the same rows in any order."""
    result = diff(cli["file order"], cli["sorted"])
    assert result.verdict is Verdict.DIVERGED
    assert found(result)[:2] == (1, "batch")
    assert diff(cli["file order"], cli["file order again"]).verdict is Verdict.SAME


def test_validation_moves_the_order_of_the_second_epoch(cli: dict[str, Path]) -> None:
    """6: both draw from numpy's global generator.  32 rows, 2 at a time: the second epoch begins with step 17."""
    result = diff(cli["no validation"], cli["validation"])
    assert result.verdict is Verdict.DIVERGED
    assert found(result)[:2] == (17, "batch")
    assert diff(cli["no validation"], cli["no validation again"]).verdict is Verdict.SAME


def test_a_setting_of_the_configuration_file_that_mlx_lm_ignores_is_seen_not_to_hold(once: Once) -> None:
    """7: `clear_cache_threshold` of the file never reaches the trainer; the twin, `save_every`, does."""
    files = paths_of(once("surprises-yaml", record_yaml)[1])
    observed = {}
    for name, file in files.items():
        with open_trace(file) as trace:
            observed[name] = dict(trace.observed)
    key = "trainer.args.clear_cache_threshold"
    assert [observed[name][key] for name in ("plain", "threshold", "saving")] == [0, 0, 0]
    assert shown(files["plain"], files["threshold"]) == set()
    assert shown(files["plain"], files["saving"]) == {"trainer.args.steps_per_save"}


def shown(a: Path, b: Path) -> set[str]:
    """Settings that a diff of two runs that are the same shows as different."""
    result = diff(a, b)
    assert result.verdict is Verdict.SAME
    return {str(name) for note in result.notes if note.id == "config.differs" for name in note.names}


def record_yaml(folder: Path) -> dict[str, str]:
    """Three runs of the program itself, whose files differ in one line."""
    import json
    import subprocess
    import sys

    from scenarios.config import load
    from scenarios.feed import make_feed
    from scenarios.paths import path_info
    from scenarios.paths.mlx_lm_cli import write_program

    config = load(None, ["train.steps=1", "data.rows=2"], base=path_info("mlx-lm-cli").base)
    feed = make_feed(config, own_batching=True)
    files = {}
    for name, line in {"plain": {}, "threshold": {"clear_cache_threshold": 12345}, "saving": {"save_every": 7}}.items():
        own = folder / name
        own.mkdir()
        program = write_program(config, feed, own)
        yaml = Path(program[-1])
        yaml.write_text(json.dumps({**json.loads(yaml.read_text()), **line}))
        files[name] = str(own / "run.h5")
        command = [sys.executable, "-m", "tracer", "record", "-o", files[name], "--", "-m", *program]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return files


def test_adam_without_bias_correction_is_named_with_its_ratio(cli: dict[str, Path]) -> None:
    """11: mlx-lm's default; the first update is 3.16 times too large."""
    result = diff(cli["bias correction"], cli["no bias correction"])
    assert found(result)[:2] == (1, "param")
    assert "optimizer.bias_correction" in causes(result)


@pytest.mark.parametrize("checkpointed", [True, False])
def test_mlx_lms_checkpointing_reaches_the_next_model_of_the_process(checkpointed: bool, tmp_path: Path) -> None:
    """12: it patches the layers' class for good, and under dropout a checkpoint draws another mask (3)."""
    settings = {"train.steps": 2, "lora.dropout": 0.3}
    files = {}
    for name, first in (("clean", False), ("after", checkpointed)):
        own = tmp_path / name
        own.mkdir()
        files[name] = own / "run.h5"
        arms = {
            "first": arm({**settings, "train.checkpointing": first}),
            "second": arm(settings, trace=files[name]),
        }
        results = run_many("mlx-lm", arms, own)
        assert not [result["error"] for result in results.values() if "error" in result]
    result = diff(files["clean"], files["after"])
    if checkpointed:
        assert found(result)[:2] == (1, "grad")
    else:
        assert result.verdict is Verdict.SAME
        assert result.counts.same_bits == result.counts.compared


DEFAULTS = {"defaults": "unsloth", "train.steps": 2, "train.accumulation": 1, "lora.rank": 8, "lora.alpha": 300}
UNSLOTH_ARMS = {
    "defaults": DEFAULTS,
    "defaults again": DEFAULTS,
    "float32": {**DEFAULTS, "model.dtype": "float32"},
    "no warm-up": {**DEFAULTS, "optimizer.warmup": 0},
    "global norm": {**DEFAULTS, "optimizer.warmup": 0, "clip.mode": "norm"},
    "like mlx": {"train.steps": 2, "train.accumulation": 2, "clip.mode": "tensor", "clip.value": 0.05},
}


@pytest.fixture(scope="session")
def unsloth(once: Once) -> dict[str, Path]:
    """Runs of unsloth's MLXTrainer."""
    arms = {name: arm(settings) for name, settings in UNSLOTH_ARMS.items()}
    made = once("surprises-unsloth", lambda folder: record_all("unsloth-mlx", arms, folder, python=UNSLOTH))
    return paths_of(made[1])


@needs_unsloth
def test_unsloths_defaults_are_the_same_twice(unsloth: dict[str, Path]) -> None:
    assert diff(unsloth["defaults"], unsloth["defaults again"]).verdict is Verdict.SAME


@needs_unsloth
def test_unsloth_casts_a_float32_checkpoint_unless_it_is_told(unsloth: dict[str, Path]) -> None:
    """8: every frozen weight differs at step 0."""
    result = diff(unsloth["float32"], unsloth["defaults"])
    assert found(result)[:2] == (0, "init")
    assert "init.frozen" in causes(result)


@needs_unsloth
def test_unsloths_first_step_has_a_rate_of_0(unsloth: dict[str, Path]) -> None:
    """9: five steps of warm-up by default."""
    result = diff(unsloth["no warm-up"], unsloth["defaults"])
    assert found(result) == (1, "hparams", "group0.lr")
    assert result.first is not None
    assert (result.first.a, result.first.b) == (pytest.approx(2e-4), 0.0)


@needs_unsloth
def test_unsloth_reports_no_gradient_norm_unless_it_clips_by_it(unsloth: dict[str, Path]) -> None:
    """10, and the clip that it does instead: each tensor by its own norm."""
    result = diff(unsloth["no warm-up"], unsloth["global norm"])
    assert found(result)[:2] == (1, "clipped_grad")
    assert {"clip.tensor", "clip.norm"} & set(causes(result))
    norms = {name: reported(unsloth[name]) for name in ("no warm-up", "global norm")}
    assert norms == {"no warm-up": [], "global norm": [f"{REPORTED_PREFIX}grad_norm"]}


def reported(file: Path) -> list[str]:
    with open_trace(file) as trace:
        row = trace.row(Phase.GRAD, 1)
        assert row is not None
        return [name for name in row.layout.positions if name.startswith(REPORTED_PREFIX)]


@needs_unsloth
def test_unsloths_trainer_and_a_hand_written_loop_agree_when_told_the_same(
    unsloth: dict[str, Path], tmp_path: Path
) -> None:
    """Two micro-batches, weighted by tokens, each tensor clipped by its own norm: on MLX and on PyTorch."""
    source = unsloth["like mlx"]
    settings = {**UNSLOTH_ARMS["like mlx"], "loss.reduction": "token-mean"}
    for path in ("mlx", "torch"):
        (own := tmp_path / path).mkdir()
        made = paths_of(record_all(path, {"run": arm(settings, source=source)}, own))
        result = diff(source, made["run"])
        assert result.verdict is Verdict.SAME, (path, result.first)
        assert result.counts.compared > 600
