"""Tasks to workers and results back, on local processes or on a Dask cluster, through `concurrent.futures` either way.

Invariant: every task has exactly one result, or the sweep raises.  A worker that dies in the middle of a task loses nothing:
Dask gives the task to another worker, and a local pool is built anew for what has no result yet.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from scenarios.sweep.plan import Task
from scenarios.sweep.work import Result, prepare, work
from tracer.errors import PackageMissing, TraceError

# How often workers may die before a sweep gives up: a task that kills its worker would kill them all.
_LIVES: Final = 3
# Seconds to reach a scheduler.
PATIENCE: Final = 10


class WorkersLost(TraceError):
    """Workers that keep dying, or a cluster that is gone."""

    slug = "workers-lost"


@dataclass(frozen=True, slots=True)
class Spread:
    """Where and how to run: local `processes`, or the Dask scheduler at `cluster`.  `sweep` tells one sweep from the next."""

    processes: int = 2
    cluster: str = ""
    threads: int = 1
    policy: Any = None
    sweep: str = field(default_factory=lambda: uuid.uuid4().hex)

    def results(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """Results as they come.  Raises WorkersLost, or PackageMissing without dask.distributed."""
        yield from self._on_cluster(tasks) if self.cluster else self._here(tasks)

    def _call(self) -> Callable[[Task], Result]:
        return partial(work, policy=self.policy, threads=self.threads, sweep=self.sweep)

    def _here(self, tasks: Sequence[Task]) -> Iterator[Result]:
        left = {id(task): task for task in tasks}
        for _ in range(_LIVES):
            if not left:
                return
            with _pool(min(self.processes, len(left))) as pool:
                futures = {pool.submit(self._call(), task): key for key, task in left.items()}
                try:
                    for future in as_completed(futures):
                        result = future.result()
                        del left[futures[future]]
                        yield result
                except BrokenProcessPool:
                    continue
        if left:
            raise WorkersLost(
                f"worker processes died {_LIVES} times, {len(left)} tasks are left",
                "look for an out-of-memory kill; what is done is kept",
            )

    def _on_cluster(self, tasks: Sequence[Task]) -> Iterator[Result]:
        try:
            from distributed import Client
            from distributed.scheduler import KilledWorker
        except ImportError as error:
            raise PackageMissing("a cluster needs dask.distributed", "pip install steptrace[cluster]") from error
        try:
            client = Client(self.cluster, timeout=PATIENCE, set_as_default=False)
        except (OSError, ValueError) as error:
            raise WorkersLost(f"no Dask scheduler answers at {self.cluster}: {error}", "check the address") from error
        with client:
            # Equal tasks are not the same task: nothing may be taken from what the cluster remembers.
            pool = client.get_executor(pure=False)
            with _cancelling(pool):
                futures: Mapping[Future[Result], Task] = {pool.submit(self._call(), task): task for task in tasks}
                try:
                    for future in as_completed(futures):
                        yield future.result()
                except KilledWorker as error:
                    raise WorkersLost(f"Dask gave up: {error}", "look into the workers' logs") from error


@contextlib.contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers are ended at once when the sweep is."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=prepare)
    try:
        with _cancelling(pool):
            yield pool
    except BaseException:
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _cancelling(pool: Executor) -> Iterator[None]:
    """What has not begun does not begin any more once something is raised."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
