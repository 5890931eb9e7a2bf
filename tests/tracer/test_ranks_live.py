"""Real runs on two ranks against one process with the same global batch: DDP, FSDP2, an exchange by hand, Trainer, MLX ring."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from differ.engine import diff
from differ.result import DiffResult, Kind, Verdict
from tests.scenarios.test_reference import changed
from tracer.ranks import RankTrace
from tracer.reader import open_trace
from tracer.schema import Phase, Record, Row
from tracer.shards import piece_of

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"
BIN = Path(sys.executable).parent
TORCHRUN = ("torchrun", "--nproc-per-node", "2")
RANKED = ("ddp", "fsdp", "hand", "local_clip", "no_sync", "unequal", "fsdp_local_clip")
ALONE = ("single", "accumulated", "tokens")


def run(*command: object, record: Path | None = None) -> str:
    """What a command prints; `record`: under `trace record`."""
    words = [str(word) for word in command]
    if record is not None:
        words = [sys.executable, "-m", "tracer", "record", "-o", str(record), "--", *words]
    path = os.pathsep.join((str(BIN), os.environ.get("PATH", "")))
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bool]]:
    """A folder with the trace of every case, and whether recording left its bits as they were."""
    pytest.importorskip("torch.distributed.fsdp")
    folder = tmp_path_factory.mktemp("cases")
    program = PROGRAMS / "ddp_cases.py"
    ranked = json.loads(run(*TORCHRUN, program, folder, *RANKED).splitlines()[-1])
    alone = json.loads(run("python", program, folder, *ALONE).splitlines()[-1])
    return folder, {**ranked, **alone}


def compared(cases: tuple[Path, dict[str, bool]], a: str, b: str) -> DiffResult:
    folder, _ = cases
    return diff(folder / f"{a}.h5", folder / f"{b}.h5")


def test_recording_changes_no_bit_on_any_rank(cases: tuple[Path, dict[str, bool]]) -> None:
    _, same = cases
    assert same == dict.fromkeys((*RANKED, *ALONE), True)


@pytest.mark.parametrize("alone", ["single", "accumulated"])
@pytest.mark.parametrize("ranked", ["ddp", "fsdp", "hand"])
def test_two_ranks_are_the_same_as_one_process_with_the_global_batch(
    cases: tuple[Path, dict[str, bool]], alone: str, ranked: str
) -> None:
    result = compared(cases, alone, ranked)
    assert result.verdict is Verdict.SAME, result.findings
    assert result.counts.steps == 3
    # Every phase of every step was compared; only what is never judged was left out.
    assert result.counts.compared > 80
    assert result.counts.unrecorded <= 5


def test_shards_are_put_together_to_the_bits_of_the_replicas(cases: tuple[Path, dict[str, bool]]) -> None:
    folder, _ = cases
    with open_trace(folder / "fsdp.h5") as ranks, open_trace(folder / "fsdp.rank1.h5") as one:
        assert isinstance(ranks, RankTrace)
        part = one.row(Phase.PARAM, 1)
        assert part is not None
        assert all(piece_of(entry.transform) is not None for entry in part.layout.entries)
    assert compared(cases, "ddp", "fsdp").verdict is Verdict.SAME


def test_a_rank_that_clips_by_its_own_norm_is_named_at_clipped_grad(cases: tuple[Path, dict[str, bool]]) -> None:
    for alone in ("single", "accumulated"):
        result = compared(cases, alone, "local_clip")
        assert result.first is not None
        assert (result.first.step, result.first.phase, result.first.kind) == (1, "clipped_grad", Kind.REPLICA)
        assert "b: rank 1 and rank 0" in result.first.detail
        assert len(result.findings) == 1
        cause = result.causes[0]
        assert cause.id == "clip.norm"
        assert (cause.explains or 0.0) > 0.999


def test_shards_that_are_clipped_by_their_own_norms_are_named_at_clipped_grad(
    cases: tuple[Path, dict[str, bool]],
) -> None:
    result = compared(cases, "accumulated", "fsdp_local_clip")
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (1, "clipped_grad")
    assert result.causes[0].id == "clip.norm"
    assert "by the norm of its own shard" in result.causes[0].summary
    assert (result.causes[0].explains or 0.0) > 0.999


def test_a_step_without_exchange_is_drift_at_grad(cases: tuple[Path, dict[str, bool]]) -> None:
    result = compared(cases, "accumulated", "no_sync")
    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.kind) == (2, "grad", Kind.REPLICA)
    assert len(result.findings) == 1
    folder, _ = cases
    with open_trace(folder / "no_sync.h5") as ranks:
        row, drift = next(ranks.drifts())
        assert (row.step, row.phase, drift.rank) == (2, Phase.GRAD, 1)
    with open_trace(folder / "ddp.h5") as clean:
        assert not list(clean.drifts())


def test_means_of_ranks_with_unequal_token_counts_are_a_mean_of_means(cases: tuple[Path, dict[str, bool]]) -> None:
    result = compared(cases, "tokens", "unequal")
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (1, "grad")
    assert result.causes[0].id == "grad.mean_of_means"


# Unmodified programs.


def test_a_trainer_under_torchrun_is_recorded_unmodified_to_the_same_bits_and_agrees_with_one_process(
    tmp_path: Path,
) -> None:
    pytest.importorskip("accelerate")
    program = PROGRAMS / "ddp_trainer.py"
    recorded = run(*TORCHRUN, program, 2, record=tmp_path / "ranks.h5").splitlines()[-1]
    plain = run(*TORCHRUN, program, 2).splitlines()[-1]
    assert recorded == plain
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ranks.rank0.h5", "ranks.rank1.h5"]
    run("python", program, 4, tmp_path / "model", record=tmp_path / "one.h5")
    result = diff(tmp_path / "one.h5", tmp_path / "ranks.h5")
    assert result.verdict is Verdict.SAME, result.findings
    assert result.counts.steps == 2
    # The reference recomputes the ranks' batches together, and sees that one was fed something else than was recorded.
    for rank in range(2):
        changed(tmp_path / f"ranks.rank{rank}.h5", tmp_path / f"fed.rank{rank}.h5", reversed_ids if rank else kept)
    said = run("python", "-c", VERIFY, tmp_path / "model", tmp_path / "ranks.h5", tmp_path / "fed.h5").splitlines()
    assert said == ["follows [1, 2] None", "diverges [1, 2] (1, 'loss', 1)"]


def test_a_launcher_that_starts_one_process_without_a_rank_leaves_the_trace_of_that_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    program = PROGRAMS / "run_of_two_steps.py"
    run("accelerate", "launch", "--cpu", "--num_processes", 1, program, record=tmp_path / "launched.h5")
    run("python", program, record=tmp_path / "plain.h5")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["launched.h5", "plain.h5"]
    result = diff(tmp_path / "plain.h5", tmp_path / "launched.h5")
    assert (result.verdict, result.counts.steps, result.notes) == (Verdict.SAME, 2, ())
    assert result.counts.same_bits == result.counts.compared


VERIFY = """
import sys
from differ.policy import default_policy
from differ.reference import judge
from scenarios.reference.engine import Options, measure
from tracer.reader import open_trace
for file in sys.argv[2:]:
    with open_trace(file) as trace:
        side = judge(measure(trace, Options("float32", sys.argv[1])), default_policy())
    first = side.first and (side.first.step, side.first.phase, side.first.micro_batch)
    print("follows" if side.follows else "diverges", [one.step for one in side.steps], first)
"""


def kept(row: Row) -> Row:
    return row


def reversed_ids(row: Row) -> Row:
    def turned(record: Record) -> Record:
        if row.phase is not Phase.BATCH or record.name != "input_ids" or record.data is None:
            return record
        return replace(record, data=record.data[:, ::-1].copy())

    return replace(row, records=tuple(turned(record) for record in row.records))


@pytest.mark.skipif(importlib.util.find_spec("mlx") is None, reason="MLX is not installed")
def test_an_mlx_ring_is_recorded_unmodified_to_the_same_bits_and_agrees_with_one_process(tmp_path: Path) -> None:
    program = PROGRAMS / "mlx_ring.py"
    launch: tuple[Any, ...] = ("mlx.launch", "--hosts", "127.0.0.1", "-n", "2", sys.executable, program)
    run(*launch, tmp_path / "recorded.json", record=tmp_path / "ranks.h5")
    run(*launch, tmp_path / "plain.json")
    assert (tmp_path / "recorded.json").read_text() == (tmp_path / "plain.json").read_text()
    run("python", program, record=tmp_path / "one.h5")
    with open_trace(tmp_path / "ranks.h5") as ranks:
        assert isinstance(ranks, RankTrace)
        assert not list(ranks.drifts())
    result = diff(tmp_path / "one.h5", tmp_path / "ranks.h5")
    assert result.verdict is Verdict.SAME, result.findings
    assert result.counts.steps == 3
