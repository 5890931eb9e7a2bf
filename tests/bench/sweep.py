"""`python -m tests.bench.sweep [FOLDER]`: 15 seeds × 4 cells on two local processes and on a Dask cluster of two workers.

A third sweep loses one of the two workers to SIGKILL after ten results.  Prints the table and the times; ends with 1 unless all
three tables are the same to the byte.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from differ.policy import default_policy
from scenarios.bisect.store import Store
from scenarios.sweep.plan import Asked, Plan, Task, make_plan
from scenarios.sweep.run import Sweep
from scenarios.sweep.spread import Spread
from scenarios.sweep.table import Table
from scenarios.sweep.work import Result
from tests.scenarios.sweep.cluster import Cluster, cluster

PLAN = """\
paths = ["mlx"]
seeds = 15

[set]
train.steps = 2
clip.mode = "value"

[baseline]
clip.mode = "none"

[grid]
clip.value = [0.05, 0.25, 0.3, 1.0]
"""
LOSES_ITS_WORKER_AFTER = 10


class Losing(Spread):
    """On a cluster that loses a worker on the way."""

    made: Cluster | None = None

    def results(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """Results as they come, with a kill in between."""
        for number, result in enumerate(super().results(tasks), start=1):
            if number == LOSES_ITS_WORKER_AFTER and type(self).made is not None:
                type(self).made.kill_worker(type(self).made.workers[0])
            yield result


def timed(name: str, plan: Plan, spread: Spread, folder: Path) -> Table:
    """One sweep with a cache of its own."""
    began = time.monotonic()
    sweep = Sweep(plan, spread, Store(folder / name))
    table = sweep.run(sweep.pending())
    print(f"{name}: {len(table.results)} results of {sweep.runs} runs in {time.monotonic() - began:.0f} s", flush=True)
    return table


def main(folder: Path) -> int:
    """Sweep three times; the exit code."""
    (folder / "plan.toml").write_text(PLAN)
    plan, policy = make_plan(folder / "plan.toml", Asked()), default_policy()
    local = timed("local", plan, Spread(2, policy=policy), folder)
    print(local.to_text(), flush=True)
    with cluster(folder) as made:
        dask = timed("dask", plan, Spread(cluster=made.address, policy=policy), folder)
        Losing.made = made
        lost = timed("dask-with-a-worker-killed", plan, Losing(cluster=made.address, policy=policy), folder)
    same = local.to_json() == dask.to_json() == lost.to_json()
    print("the three tables are the same" if same else "THE TABLES DIFFER")
    return int(not same)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as made_folder:
        sys.exit(main(Path(made_folder)))
