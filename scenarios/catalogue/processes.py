"""Processes that record arms, one after another, and which of them records what next.

A process belongs to one host: a training path, with the programs that may be recorded beside it, or one program alone.  It
is started when there is something for it to do and ended when there will be no more; one that died, hung, or in which an arm left
something behind is replaced.  Invariant: never do more processes work at the same time than were asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# A second process for the same host is worth its imports from this many arms on, for each process there is.
_WORTH_A_PROCESS: Final = 10
_TAIL: Final = 6
# Arms are tiny runs; one that takes longer than this hangs, seconds.
TIMEOUT: Final = 600.0
# Variable that names the file in which the first rank tells the others what it is asked.
ASKED: Final = "TRACE_SCENARIOS_ASKED"
Told = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Host:
    """What shares a process: its name, the packages that such a process imports before its first arm, how many ranks it is."""

    name: str
    packages: tuple[str, ...] = ()
    ranks: int = 1

    def command(self) -> list[str]:
        """How a process of it is started; torchrun starts one for each rank."""
        python = [sys.executable, "-W", "ignore", "-m"]
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), "-m"]
        return [*python, *(launcher if self.ranks > 1 else []), "scenarios.catalogue.worker", *self.packages]


@dataclass(frozen=True, slots=True)
class Task:
    """One arm for a worker: its key, where it may run, the keys of the tasks that come before, and what the worker is told."""

    key: str
    host: Host
    after: frozenset[str]
    told: Mapping[str, Any]


class Process:
    """One worker.  What it prints goes to a log, which stays where an arm failed.  Not for two threads at a time."""

    def __init__(self, host: Host, log: Path) -> None:
        self.host, self._log = host, log
        self.usable, self._failed = True, False
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                host.command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=_environment(log.with_suffix(".asked")),
            )

    def record(self, task: Task) -> Mapping[str, Any]:
        """Have it record; what it answers, or an `error` where it died or was killed because it hung."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(task.told), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        answer: dict[str, Any] = json.loads(line) if line else {"error": self._last_words(), "slug": ""}
        self.usable = bool(line) and not answer.get("left")
        self._failed |= "error" in answer
        return answer

    def end(self) -> None:
        """Let it go, by force if it does not."""
        with contextlib.suppress(OSError), self._process:
            if self.usable and self._process.stdin is not None:
                self._process.stdin.close()
            else:
                self._process.kill()
        if not self._failed:
            self._log.unlink(missing_ok=True)
        self._log.with_suffix(".asked").unlink(missing_ok=True)

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = [line for line in self._log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
        return f"its process ended with exit code {code}: {' | '.join(lines[-_TAIL:]) or 'it printed nothing'}"


class Schedule:
    """Tasks that wait, and processes that are free; shared by as many threads as there may be processes at work."""

    def __init__(self, tasks: Sequence[Task], folder: Path, told: Told) -> None:
        self._waiting = {task.key: task for task in tasks}
        self._undone = set(self._waiting)
        self._free: dict[Host, list[Process]] = defaultdict(list)
        self._count: dict[Host, int] = defaultdict(int)
        self._changed = threading.Condition()
        self._folder, self._told, self._started = folder, told, 0

    def work(self) -> None:
        """Record tasks until none is left; the body of each thread."""
        try:
            while (task := self._next()) is not None:
                self._record(task)
        except BaseException:
            with self._changed:
                self._waiting.clear()
            raise
        finally:
            with self._changed:
                self._changed.notify_all()

    def close(self) -> None:
        """End the processes that are left."""
        for process in [process for free in self._free.values() for process in free]:
            process.end()
        self._free.clear()

    def _next(self) -> Task | None:
        with self._changed:
            while self._waiting:
                if (task := self._choice()) is not None:
                    return self._waiting.pop(task.key)
                self._changed.wait()
            return None

    def _choice(self) -> Task | None:
        """The task to do now: for a process that is free, else for a host without one, else where a further one pays."""
        ready: dict[Host, list[Task]] = defaultdict(list)
        for task in self._waiting.values():
            if not task.after & self._undone:
                ready[task.host].append(task)
        hosts = sorted(ready, key=lambda host: len(ready[host]), reverse=True)
        free = [host for host in hosts if self._free.get(host)]
        new = [host for host in hosts if not self._count[host]]
        more = [host for host in hosts if len(ready[host]) >= _WORTH_A_PROCESS * self._count[host]]
        host = next(iter((*free, *new, *more)), None)
        if host is None:
            return None
        # What others wait for comes first, so that their hosts are not idle.
        wanted = [key for task in self._waiting.values() for key in task.after]
        return max(ready[host], key=lambda task: wanted.count(task.key))

    def _record(self, task: Task) -> None:
        process = self._process(task.host)
        try:
            answer = process.record(task)
        except BaseException:
            process.usable = False
            process.end()
            raise
        with self._changed:
            self._finish(task.key, answer)
            over = self._put_back(process)
            self._changed.notify_all()
        for one in over:
            one.end()

    def _process(self, host: Host) -> Process:
        with self._changed:
            if self._free[host]:
                return self._free[host].pop()
            self._count[host] += 1
            self._started += 1
            log = self._folder / f"process-{self._started}.log"
        return Process(host, log)

    def _finish(self, key: str, answer: Mapping[str, Any]) -> None:
        """Note what became of a task; those that start from one that failed are not done at all."""
        self._undone.discard(key)
        self._told(key, answer)
        if "error" not in answer:
            return
        because = {"error": f"the run that it starts from failed: {answer['error']}", "slug": ""}
        for task in [task for task in self._waiting.values() if key in task.after]:
            if self._waiting.pop(task.key, None) is not None:
                self._finish(task.key, because)

    def _put_back(self, process: Process) -> list[Process]:
        """Free a process for its host's next task; the processes that there is nothing left for."""
        waiting = any(task.host == process.host for task in self._waiting.values())
        if process.usable and waiting:
            self._free[process.host].append(process)
            return []
        self._count[process.host] -= 1
        return [process, *([] if waiting else self._free.pop(process.host, []))]


def _environment(asked: Path) -> Mapping[str, str]:
    """One thread a process, which is faster for tiny models, and a checkout that is not installed works too.

    `asked`: where the first rank tells the others what it is asked.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    ours = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", ASKED: str(asked)}
    return os.environ | threads | ours
