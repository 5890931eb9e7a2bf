"""A real Dask cluster on this machine: a scheduler and worker processes, one of which may be killed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PATIENCE = 60.0


@dataclass
class Cluster:
    """Scheduler and workers as processes; `address` is what `--cluster` takes."""

    folder: Path
    address: str = ""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def add_worker(self) -> subprocess.Popen[bytes]:
        """A worker of one thread and without a nanny, so that killing it is for good."""
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", str(self.folder)]
        self.workers.append(self._start("worker", self.address, *options))
        return self.workers[-1]

    def kill_worker(self, worker: subprocess.Popen[bytes]) -> None:
        """SIGKILL: no goodbye to the scheduler."""
        worker.send_signal(signal.SIGKILL)
        worker.wait()

    def _start(self, *words: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{words[0]}.log").open("ab")
        with log:
            return subprocess.Popen([sys.executable, "-m", "dask", *words], stdout=log, stderr=log)


@contextlib.contextmanager
def cluster(folder: Path, workers: int = 2) -> Iterator[Cluster]:
    """A cluster while the block runs."""
    made = Cluster(folder)
    where = folder / "scheduler.json"
    scheduler = made._start(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(where)
    )
    try:
        made.address = _address(where, scheduler)
        for _ in range(workers):
            made.add_worker()
        yield made
    finally:
        for process in (*made.workers, scheduler):
            process.terminate()
        for process in (*made.workers, scheduler):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(where: Path, scheduler: subprocess.Popen[bytes]) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert scheduler.poll() is None, (where.parent / "scheduler.log").read_text()
        with contextlib.suppress(OSError, ValueError, KeyError):
            return str(json.loads(where.read_text())["address"])
        time.sleep(0.1)
    raise TimeoutError("the scheduler did not start")
