"""A sweep of real runs on local processes and on a real Dask cluster: the same table, also when a worker is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from differ.policy import default_policy
from scenarios.bisect.store import Store
from scenarios.hosts import Hosts
from scenarios.launch import RunFailed
from scenarios.sweep import spread
from scenarios.sweep.plan import Asked, Plan, Task, make_plan
from scenarios.sweep.run import Sweep
from scenarios.sweep.spread import Spread
from scenarios.sweep.table import Table, make_table
from scenarios.sweep.work import Result, Worker
from tests.scenarios.bisect.driven import trace
from tests.scenarios.conftest import needs_torch
from tests.scenarios.sweep.cluster import cluster

pytestmark = needs_torch

PLAN = """\
paths = ["torch"]
seeds = 3
[set]
train.steps = 2
clip.mode = "value"
[baseline]
clip.mode = "none"
[grid]
clip.value = [0.01, 1.0]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "plan.toml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def plan(file: Path) -> Plan:
    return make_plan(file, Asked())


@pytest.fixture(scope="module")
def local(file: Path) -> str:
    """JSON of the table from two local processes; the cache stays beside the plan."""
    done = trace("sweep", file, "--cache", file.parent / "cache", "--format", "json")
    assert done.code == 1, done.stderr
    assert "2 cells × 3 seeds, 6 to run on 2 processes" in done.stderr
    return done.stdout


def test_each_cell_has_its_rate_and_its_first_divergence(local: str, file: Path) -> None:
    done = trace("sweep", file, "--cache", file.parent / "cache")
    assert "0 to run on 2 processes, 6 known from the cache" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == 'DIVERGED: 3 of 6 runs are the same as the baseline (clip.mode = "none")'
    assert lines[1].split("  ")[1:2] == ["cell"]
    assert lines[2].startswith("  clip.value = 0.01  0 of 3  0 %    0 to 56 %      step 1, clipped_grad, model.layers.")
    assert lines[2].endswith("b clips each element to ±0.01; a does not clip")
    assert lines[3] == "  clip.value = 1.0   3 of 3  100 %  44 to 100 %"


def table_of(plan: Plan, results: Iterator[Result]) -> Table:
    return make_table(plan, list(results))


def test_a_dask_cluster_that_loses_a_worker_in_the_middle_gives_the_same_table(
    plan: Plan, local: str, tmp_path: Path
) -> None:
    from distributed import Client

    with cluster(tmp_path) as made, Client(made.address, set_as_default=False) as watching:
        watching.wait_for_workers(2)
        dask = Spread(cluster=made.address, policy=default_policy())
        taken: list[Result] = []
        pending: dict[str, int] = {}
        dead = made.workers[0]

        def results() -> Iterator[Result]:
            for result in dask.results(plan.tasks()):
                taken.append(result)
                yield result
                if len(taken) == 1:
                    # Both workers have tasks of their own now; one of them is what the dead one was doing.
                    pending.update({worker: len(keys) for worker, keys in watching.processing().items()})
                    made.kill_worker(dead)

        table = table_of(plan, results())
        alive = watching.scheduler_info()["workers"]
    assert len(pending) == 2
    assert min(pending.values()) >= 1
    assert len(alive) == 1
    assert sorted((r.cell, r.seed) for r in taken) == [(cell, seed) for cell in (0, 1) for seed in (0, 1, 2)]
    assert table.to_json() == local


def test_a_local_worker_that_dies_loses_no_task(tmp_path: Path) -> None:
    """The runs fail before they import a framework: what is looked at is that each task has its result, once."""
    options = Asked(("torch",), settings=("data.source=missing.jsonl",), seeds="8", rule="loss<=1")
    tasks = make_plan(None, options).tasks()
    seen: list[int] = []
    for result in Spread(2, policy=default_policy()).results(tasks):
        seen.append(result.seed)
        assert "missing.jsonl does not exist" in result.error
        if len(seen) == 1:
            os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    assert sorted(seen) == list(range(8))


def test_workers_that_keep_dying_end_the_sweep_with_an_error(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spread, "_call", lambda _: _dies)
    with pytest.raises(spread.WorkersLost, match="worker processes died 3 times, 6 tasks are left"):
        list(Spread(1).results(plan.tasks()))


def _dies(task: Task) -> Result:
    os._exit(3)


def test_what_came_in_before_ctrl_c_is_kept(plan: Plan, tmp_path: Path) -> None:
    class Interrupted(Spread):
        def results(self, tasks: Sequence[Task]) -> Iterator[Result]:
            yield from (Result(task.cell, task.seed, task.column, True, runs=2) for task in tasks[:4])
            raise KeyboardInterrupt

    store = Store(tmp_path / "cache")
    sweep = Sweep(plan, Interrupted(policy=default_policy()), store)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(sweep.pending())
    again = Sweep(plan, Spread(policy=default_policy()), store)
    assert len(again.pending()) == 2
    assert [(r.cell, r.seed, r.runs) for r in again.results] == [(t.cell, t.seed, 2) for t in plan.tasks()[:4]]


def test_a_cluster_that_is_not_there_is_one_line_and_2(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "PATIENCE", 1)
    done = trace("sweep", file, "--cluster", "tcp://127.0.0.1:9", "--cache", tmp_path / "none")
    assert (done.code, done.stdout) == (2, "")
    assert "no Dask scheduler answers" in done.stderr


def test_a_run_that_fails_gives_no_answer_and_is_tried_again_the_next_time(tmp_path: Path) -> None:
    options = ("--seeds", 1, "--processes", 1, "--pass", "loss<=100", "--set", "data.source=missing.jsonl")
    for _ in range(2):
        done = trace("sweep", "--path", "torch", *options, "--cache", tmp_path)
        assert done.code == 2, done.stderr
        assert "1 to run" in done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == "NO ANSWER: 0 of 1 runs have loss<=100, 1 gave no answer"
        assert "missing.jsonl does not exist" in lines[-1]
        assert "what gave no answer (1) is tried again the next time" in done.stderr


def test_a_reference_that_failed_is_run_once_in_a_sweep_and_again_in_the_next(plan: Plan) -> None:
    class Down(Hosts):
        def record(self, *_: object, **__: object) -> Path:
            raise RunFailed("killed")

    worker = Worker(1, hosts=Down())
    tasks = [task for task in plan.tasks() if task.seed == 0]
    assert len(tasks) == 2
    for sweep in ("first", "second"):
        results = [worker.do(task, default_policy(), sweep) for task in tasks]
        assert [(result.passed, "killed" in result.error, result.runs) for result in results] == [
            (None, True, 1),
            (None, True, 0),
        ]
    worker.close()
