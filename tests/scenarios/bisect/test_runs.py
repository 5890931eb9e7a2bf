"""A bisection of real runs: what it names, its budget, an interruption, and going on from the cache."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scenarios.bisect import runs
from scenarios.bisect.jobs import Job
from scenarios.bisect.space import PARTS, Item, Side, Space
from scenarios.bisect.store import Store
from scenarios.config import RunConfig, load
from scenarios.launch import Arm, RunFailed
from tests.builders import make_trace
from tests.scenarios.bisect.driven import ROOT, trace
from tests.scenarios.conftest import needs_mlx, needs_torch

# On the MLX path Adam has no weight decay: a choice with b's decay and a's optimizer cannot run.
A = """\
train.steps = 100
train.seed_at = "after-load"
lora.layers = 3
optimizer = { name = "adam", lr = 1e-3 }
"""
B = """\
train.steps = 60
train.compile = true
train.seed_at = "before-load"
data = { order_seed = 3, mask_step = 2, batching = "library" }
lora = { layers = "all", targets = "linear" }
optimizer = { name = "adamw", lr = 1e-3, weight_decay = 0.1 }
"""
OPTIONS = ("--path", "mlx", "--warm", "--format", "json")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a.toml").write_text(A)
    (tmp_path / "b.toml").write_text(B)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bisect(*more: object, code: int) -> dict[str, Any]:
    done = trace("bisect", "a.toml", "b.toml", *OPTIONS, *more)
    assert done.code == code, done.stderr
    return dict(json.loads(done.stdout))


def interrupted(cache: Path) -> tuple[int, str]:
    """Start a bisection in a process of its own and press Ctrl-C once two runs are in the cache."""
    command = [sys.executable, "-m", "tracer", "bisect", "a.toml", "b.toml", *OPTIONS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    with contextlib.suppress(subprocess.TimeoutExpired):
        while len(list(cache.glob("runs/*.json"))) < 2 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


@needs_mlx
def test_a_bisection_names_what_matters_and_goes_on_after_ctrl_c_and_a_budget(folder: Path) -> None:
    cache = folder / ".trace-bisect"
    code, said = interrupted(cache)
    assert code == 130, said
    assert "are kept in .trace-bisect; the same command goes on" in said
    kept = len(list(cache.glob("runs/*.json")))
    assert kept >= 2

    partial = bisect("--max-runs", 1, code=2)
    assert (partial["complete"], partial["runs"]["recorded"]) == (False, 1)
    assert partial["runs"]["cached"] >= 2
    assert "--max-runs" in partial["spent"]
    assert partial["harmless"] == []

    report = bisect(code=1)
    named = [[item["key"] for item in found["items"]] for found in report["found"]]
    assert named == [["lora.layers"], ["train.seed_at"], ["optimizer.name", "optimizer.weight_decay"]]
    assert [found["first"]["phase"] for found in report["found"][:2]] == ["init", "init"]
    assert [found["causes"][0]["id"] for found in report["found"][:2]] == ["init.names", "init.draw"]
    assert "MLX's Adam has none" in report["unresolved"][0]["error"]
    assert {"train.steps", "train.compile", "lora.targets", "data.mask_step"} <= set(report["harmless"])
    assert kept + 1 + report["runs"]["recorded"] <= 18
    # Only what may be a base again is left of the traces.
    assert len(list(cache.glob("runs/*.h5"))) <= 4

    spoken = trace("bisect", "a.toml", "b.toml", "--path", "mlx", "-q")
    assert spoken.stdout.startswith("DIVERGED: 10 settings differ, 4 settings make b diverge from a\n")
    # Only what failed is run again.
    failed = report["runs"]["failed"]
    assert failed == 1
    assert f"{failed} run of 2 steps" in spoken.stdout
    assert f"{failed} of them failed (tried again the next time)" in spoken.stdout


@needs_mlx
@needs_torch
def test_across_two_frameworks_the_draw_of_the_adapters_is_what_differs(folder: Path) -> None:
    done = trace("bisect", "--path", "torch", "--across", "mlx", "--warm", "--no-repeat", "--format", "json")
    assert done.code == 1, done.stderr
    report = json.loads(done.stdout)
    assert [item["key"] for item in report["differing"]] == ["init", "batches", "path"]
    assert [[item["key"] for item in found["items"]] for found in report["found"]] == [["init"]]
    assert report["found"][0]["causes"][0]["id"] == "init.draw"
    assert report["harmless"] == ["batches", "path"]


def test_runs_that_differ_in_nothing_are_the_same_and_nothing_is_run(folder: Path) -> None:
    done = trace("bisect", "a.toml", "a.toml", "--path", "mlx", "-q")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith("SAME: no setting differs")


def flat(**changes: Any) -> dict[str, Any]:
    return load(None, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]).flat()


def space(a: str, b: str, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> Space:
    return Space(Side(a, first or flat()), Side(b, second or flat()))


def test_nothing_chosen_is_a_and_everything_chosen_is_b() -> None:
    of = space("mlx", "mlx-lm", flat(lora__rank=4), flat(lora__rank=16, clip__mode="norm"))
    everything = [item.key for item in of.items()]
    a, b = of.job((), 2), of.job(everything, 2)
    assert (a.path, a.settings) == ("mlx", {**of.a.settings, "train.steps": 2})  # type: ignore[dict-item]
    assert (b.path, b.settings) == ("mlx-lm", {**of.b.settings, "train.steps": 2})  # type: ignore[dict-item]
    assert a.init_from is a.batches_from is b.init_from is b.batches_from is None


def test_components_of_mlx_paths_move_one_by_one() -> None:
    of = space("mlx-lm", "unsloth-mlx")
    assert [item.key for item in of.items()] == ["parts.loader", "init", "batches", "parts.loss", "parts.loop"]
    a, b = of.job((), 2), of.job([item.key for item in of.items()], 2)

    def parts(*chosen: str) -> tuple[str, ...]:
        job = of.job(chosen, 2)
        assert job.settings is not None
        return (job.path, *(str(job.settings[f"parts.{part}"]) for part in PARTS))

    assert parts("parts.loss") == ("mlx-lm", "path", "unsloth-mlx", "path")
    assert parts("parts.loader") == ("mlx-lm", "unsloth-mlx", "path", "path")
    assert parts("parts.loop") == ("unsloth-mlx", "mlx-lm", "mlx-lm", "path")
    assert of.job(["init"], 2).init_from == b
    assert of.job(["parts.loader"], 2).init_from == a
    assert of.job(["parts.loader", "init"], 2).init_from is None
    assert of.job(["parts.loop"], 2).batches_from == a


def test_a_path_that_cannot_be_taken_apart_is_one_component() -> None:
    of = space("torch", "mlx")
    a, b = of.job((), 2), of.job(("init", "batches", "path"), 2)
    assert (of.job(("path",), 2).init_from, of.job(("path",), 2).batches_from) == (a, a)
    assert (of.job(("init",), 2).path, of.job(("init",), 2).init_from) == ("torch", b)


def test_a_schedule_that_depends_on_the_length_of_the_run_keeps_it() -> None:
    steady = space("mlx", "mlx", flat(train__steps=9), flat(train__steps=5))
    assert steady.job((), 2).key() == steady.job(("train.steps",), 2).key()
    falling = space("mlx", "mlx", flat(train__steps=9, optimizer__schedule="linear"), flat(train__steps=5))
    assert falling.job((), 2).settings["train.steps"] == 9  # type: ignore[index]
    assert falling.job(("train.steps",), 2).key() != falling.job((), 2).key()


def test_a_run_is_known_by_all_that_decides_it(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    of = space("mlx", "mlx", flat(data__source=rows), flat(lora__rank=4))
    keys = {of.job((), 2).key(), of.job((), 3).key(), of.job(("lora.rank",), 2).key(), of.job((), 2).again().key()}
    rows.write_text('{"text": "two"}\n')
    assert len(keys | {of.job((), 2).key()}) == 5


class Machine:
    """Stands in for the processes that record: each run fails as long as it is not `well`."""

    def __init__(self, trace: Path) -> None:
        self.trace, self.well, self.ran = trace, False, list[str]()

    def record(self, arm: Arm, trace: Path, options: object) -> None:
        self.ran.append(str(arm.settings["lora.rank"]))
        if not self.well and arm.settings["lora.rank"] == 4:
            raise RunFailed("the run on path mlx ended with exit code -9")
        shutil.copy(self.trace, trace)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(make_trace(tmp_path / "made.h5"))
    monkeypatch.setattr(runs, "record", made.record)
    return made


def ranks() -> tuple[Job, Job]:
    of = space("mlx", "mlx", flat(lora__rank=2), flat(lora__rank=4))
    return of.job((), 2), of.job(("lora.rank",), 2)


def test_a_run_that_failed_is_not_run_twice_in_a_bisection_and_is_tried_again_in_the_next(
    tmp_path: Path, machine: Machine
) -> None:
    a, b = ranks()
    first = runs.Runs(Store(tmp_path / "cache"))
    for _ in range(2):
        answer = first.compare(a, b)
        assert (answer.verdict, answer.error) == (runs.FAILED, "the run on path mlx ended with exit code -9")
    with pytest.raises(RunFailed, match="exit code -9"):
        first.trace(b)
    assert (machine.ran, first.counts.recorded, first.counts.failed) == (["2", "4"], 2, 1)

    machine.well = True
    told: list[str] = []
    again = runs.Runs(Store(tmp_path / "cache"), telling=told.append)
    assert again.compare(a, b, "lora.rank").verdict == runs.SAME
    assert (machine.ran[2:], again.counts.recorded, again.counts.cached) == (["4"], 1, 1)
    assert told == ["lora.rank (failed the last time, tried again)"]

    # What did not fail is known for good.
    third = runs.Runs(Store(tmp_path / "cache"))
    assert third.compare(a, b).verdict == runs.SAME
    assert (len(machine.ran), third.counts.recorded, third.counts.cached) == (3, 0, 2)


def test_what_fails_again_does_not_need_its_base_again(tmp_path: Path, machine: Machine) -> None:
    a, b = ranks()
    first = runs.Runs(Store(tmp_path / "cache"))
    first.compare(a, b)
    first.forget_traces()
    again = runs.Runs(Store(tmp_path / "cache"))
    assert again.compare(a, b).verdict == runs.FAILED
    assert machine.ran == ["2", "4", "4"]


def test_every_setting_of_a_configuration_may_be_an_item() -> None:
    of = space("mlx", "mlx", RunConfig().flat(), flat(lora__targets='["q_proj"]'))
    assert of.items() == (Item("lora.targets", RunConfig().flat()["lora.targets"], ["q_proj"]),)


def test_a_cache_that_cannot_be_written_is_one_line_and_2(folder: Path) -> None:
    (folder / "file").write_text("")
    done = trace("bisect", "a.toml", "b.toml", "--path", "mlx", "--cache", folder / "file")
    assert (done.code, done.stdout) == (2, "")
    assert "cannot be made" in done.stderr


def test_what_the_store_cannot_read_it_does_not_know(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("runs", "k", {"error": ""})
    assert store.read("runs", "k") == {"error": ""}
    (tmp_path / "runs" / "k.json").write_text("{")
    assert store.read("runs", "k") is None
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["k.json"]
