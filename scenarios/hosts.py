"""A warm process that records one run after another: a framework is imported once, not once a run.

    python -m scenarios.hosts PATH      reads one run a line (JSON) from stdin, answers one line (JSON) each

A host serves one training path.  Runs whose settings change a process for good (`LASTING`) get a host of their own, so that no
run is moved by the one before it.  What a training library prints goes to stderr, which is shown only when a run fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, TextIO

from scenarios.launch import Arm, RunFailed
from tracer.errors import TraceError
from tracer.interpreters import lent

# mx.set_default_device, mlx-lm's gradient checkpointing and unsloth's patches last as long as their process.
LASTING: Final = ("train.device", "train.checkpointing", "parts.loader", "parts.loss", "parts.loop")
# What OpenMP, MKL and OpenBLAS read.
THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_TAIL: Final = 12


@dataclass(slots=True)
class Host:
    """One warm process, with so many threads in its libraries.  One that died is started again for the next run."""

    path: str
    python: str = sys.executable
    threads: int | None = None
    _lent: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _process: subprocess.Popen[str] | None = None
    _said: IO[bytes] | None = None

    def record(self, arm: Arm, trace: Path, *, what: str = "", steps: int | None = None) -> None:
        """Record a run, or its first steps, into `trace`; raises RunFailed."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        task = {
            "settings": dict(arm.settings),
            "init_from": str(arm.init_from) if arm.init_from is not None else None,
            "batches_from": str(arm.batches_from) if arm.batches_from is not None else None,
            "trace": str(trace),
            "what": what,
            "steps": steps,
        }
        try:
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        except BaseException:  # Ctrl-C in the middle of a run: its answer must not be taken for the next one's
            self.close()
            raise
        if not line:
            raise RunFailed(f"the run on path {arm.path} ended its process: {self._ended()}")
        error = json.loads(line)["error"]
        if error:
            raise RunFailed(f"the run on path {arm.path} failed: {error}")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
            command = [self.python, "-W", "ignore", "-m", "scenarios.hosts", self.path]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=self._environment(),
            )
        return self._process

    def _environment(self) -> dict[str, str]:
        ours = self._lent.enter_context(lent(self.python))
        return {**os.environ, **ours, **({name: str(self.threads) for name in THREADS} if self.threads else {})}

    def _ended(self) -> str:
        """Exit code and last words of a process that died."""
        assert self._process is not None
        assert self._said is not None
        code = self._process.wait()
        self._said.seek(0)
        lines = [line for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip()]
        return f"exit code {code}: {' | '.join(lines[-_TAIL:])}"

    def kill(self) -> None:
        """End the process and touch nothing else: what a signal handler may do."""
        if self._process is not None:
            self._process.kill()

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
        if self._said is not None:
            self._said.close()
            self._said = None
        self._lent.close()


@dataclass(slots=True)
class Hosts:
    """Warm processes by path, interpreter and lasting settings."""

    _hosts: dict[tuple[str, ...], Host] = field(default_factory=dict)

    def record(
        self, arm: Arm, trace: Path, *, what: str = "", steps: int | None = None, threads: int | None = None
    ) -> Path:
        """Record a run, or its first steps, in the process that fits it; raises RunFailed."""
        python = str(arm.python or sys.executable)
        key = (arm.path, python, str(threads), *(str(arm.settings.get(name)) for name in LASTING))
        host = self._hosts.setdefault(key, Host(arm.path, python, threads))
        host.record(arm, trace, what=what, steps=steps)
        return trace

    def kill(self) -> None:
        """End all processes and touch nothing else."""
        for host in self._hosts.values():
            host.kill()

    def close(self) -> None:
        """End all processes."""
        for host in self._hosts.values():
            host.close()
        self._hosts.clear()

    def __enter__(self) -> Hosts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(path: str, tasks: TextIO, answers: TextIO) -> None:
    """Record every task until `tasks` ends."""
    for line in tasks:
        began = time.monotonic()
        error = _record(path, json.loads(line))
        answers.write(json.dumps({"error": error, "seconds": time.monotonic() - began}) + "\n")
        answers.flush()


def _record(path: str, task: Mapping[str, Any]) -> str:
    """Record one run; "" or what went wrong, in one line."""
    from scenarios.run import run
    from tracer.reader import open_trace
    from tracer.recorder import DEFAULT_PHASES, recording
    from tracer.schema import Phase

    given = (f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in task["settings"].items())
    init_from, batches_from = (Path(task[name]) if task[name] else None for name in ("init_from", "batches_from"))
    words = [word.strip() for word in task["what"].split(",") if word.strip()]
    try:
        phases = frozenset(Phase.parse(word) for word in words) or DEFAULT_PHASES
        steps = (1, task["steps"]) if task["steps"] else None
        with recording(task["trace"], what=phases, steps=steps, overwrite=True):
            run(path, None, tuple(given), init_from=init_from, batches_from=batches_from)
        with open_trace(task["trace"]) as written:
            return "" if written.finished else f"recording stopped after step {written.last_step}"
    except TraceError as error:
        return error.line()
    except Exception as error:  # noqa: BLE001 - whatever a training library dies of, the next run may work
        return " ".join(f"{type(error).__name__}: {error}".split())


def main() -> None:
    """Serve the path named on the command line; stdout is for answers only."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        serve(sys.argv[1], sys.stdin, answers)


if __name__ == "__main__":
    main()
