"""Runs that share a process: what is left behind is found or put back, and who records what when."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scenarios.catalogue import processes
from scenarios.catalogue.processes import Host, Schedule, Task
from tests.scenarios.conftest import needs_mlx, needs_torch

ROOT = Path(__file__).parents[2]
LEFT: dict[str, str] = {
    "torch.default_dtype": "torch.set_default_dtype(torch.float64)",
    "torch.nn.modules.module._global_forward_hooks": "torch.nn.modules.module.register_module_forward_hook(print)",
    "torch.grad_enabled": "torch.set_grad_enabled(False)",
    "torch.optim.adam.Adam.step": "torch.optim.Adam.step = lambda self: None",
    "torch.nn.modules.linear.Linear.mine": "torch.nn.Linear.mine = lambda self: None",
    "numpy.errstate": "numpy.seterr(all='ignore')",
}


def look(*lines: str) -> Any:
    """What a program prints as JSON."""
    code = "\n".join(("import json, os, random, sys, warnings, numpy", *lines))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MADE = "from scenarios.catalogue.surroundings import Surroundings; before = Surroundings()"
SAY = "print(json.dumps(before.left()))"


@needs_torch
def test_what_a_run_leaves_in_its_process_is_named() -> None:
    assert look("import torch", MADE, SAY) == []
    assert look("import torch", MADE, *LEFT.values(), SAY) == sorted(LEFT)


@needs_mlx
def test_a_librarys_own_patch_of_a_class_that_was_not_imported_before_is_named() -> None:
    lines = (
        "from mlx_lm.models.llama import ModelArgs, TransformerBlock",
        "sizes = dict(hidden_size=8, num_hidden_layers=1, intermediate_size=8, num_attention_heads=1, vocab_size=8)",
        "block = TransformerBlock(ModelArgs(model_type='llama', rms_norm_eps=1e-5, **sizes))",
        "from mlx_lm.tuner.trainer import grad_checkpoint",
    )
    assert look(MADE, *lines, SAY) == []
    assert look(MADE, *lines, "grad_checkpoint(block)", SAY) == ["mlx_lm.models.llama.TransformerBlock.__call__"]


@needs_torch
def test_random_states_environment_and_warning_filters_are_put_back() -> None:
    draw = "[random.random(), float(numpy.random.random()), float(torch.rand(())), 'MINE' in os.environ, warnings.filters[0][0]]"
    seeds = "random.seed(9); numpy.random.seed(9); torch.manual_seed(9)"
    change = f"{seeds}; os.environ['MINE'] = '1'; warnings.simplefilter('error')"
    lines = (
        "import torch",
        MADE,
        f"first = {draw}",
        change,
        f"changed = {draw}",
        "before.restore()",
        f"again = {draw}",
    )
    first, changed, again = look(*lines, "print(json.dumps([first, changed, again]))")
    assert first == again
    assert all(one != other for one, other in zip(first, changed, strict=True))


# Which process records what, with workers that only answer.

WORKER = """
import json, os, sys, time
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("dies"):
        sys.exit("it burst")
    time.sleep(asked.get("takes", 0))
    print(json.dumps({"process": os.getpid(), **asked.get("answer", {})}), flush=True)
"""


def schedule(tasks: list[Task], folder: Path, monkeypatch: pytest.MonkeyPatch, workers: int = 1) -> dict[str, Any]:
    """The answers by key, in the order in which they came."""
    monkeypatch.setattr(Host, "command", lambda _: [sys.executable, "-c", WORKER])
    answers: dict[str, Any] = {}

    def note(key: str, answer: Mapping[str, Any]) -> None:
        answers[key] = answer

    made = Schedule(tasks, folder, note)
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(made.work) for _ in range(workers)]:
            done.result(timeout=60)
    made.close()
    return answers


def task(key: str, host: str = "h", after: str = "", **told: Any) -> Task:
    return Task(key, Host(host), frozenset(after.split()), told)


def test_runs_of_one_host_share_a_process_and_hosts_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = schedule([task("a"), task("b"), task("c", "other")], tmp_path, monkeypatch)
    assert answers["a"] == answers["b"] != answers["c"]
    assert list(tmp_path.iterdir()) == []


def test_a_process_in_which_something_was_left_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = schedule([task("a", answer={"left": ["a hook"]}), task("b"), task("c")], tmp_path, monkeypatch)
    assert answers["a"]["process"] != answers["b"]["process"] == answers["c"]["process"]


def test_a_process_that_dies_takes_one_run_with_it_and_those_that_start_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [task("a", dies=True), task("b"), task("c", "other", after="a"), task("d", "other", after="c")]
    answers = schedule(tasks, tmp_path, monkeypatch)
    assert answers["a"]["error"] == "its process ended with exit code 1: it burst"
    assert "error" not in answers["b"]
    assert "starts from failed" in answers["c"]["error"]
    assert "starts from failed" in answers["d"]["error"]
    assert [file.suffix for file in tmp_path.iterdir()] == [".log"]


def test_a_run_waits_for_what_it_starts_from_and_that_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [task("late", "other", after="last"), task("first"), task("last", takes=0.2)]
    assert list(schedule(tasks, tmp_path, monkeypatch, workers=2)) == ["last", "first", "late"]


def test_no_more_processes_work_at_a_time_than_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working, most, lock = 0, 0, threading.Lock()
    original = processes.Process.record

    def record(process: processes.Process, one: Task) -> Mapping[str, Any]:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        answer = original(process, one)
        time.sleep(0.02)
        with lock:
            working -= 1
        return answer

    monkeypatch.setattr(processes.Process, "record", record)
    tasks = [task(f"{host}{n}", host) for host in ("x", "y", "z") for n in range(3)]
    assert len(schedule(tasks, tmp_path, monkeypatch, workers=2)) == 9
    assert most == 2
