"""A real run that is killed, and one whose disk fills up: the run's business and ours are kept apart."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tracer.test_cli import trace
from tracer.errors import TraceError
from tracer.reader import open_trace

ROOT = Path(__file__).parents[2]
RUN = ("record", "--force", "-o")
PROGRAM = ("--", "-m", "scenarios.run", "mlx", "--set", "model.name=tiny-llama")


def start(output: Path, steps: int, limit: int = 0) -> subprocess.Popen[str]:
    """A recorded run in a process of its own; `limit`: the largest file that it may write, in bytes."""

    def confine() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "tracer", *RUN, str(output), *PROGRAM, "--set", f"train.steps={steps}"]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=confine
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "whole.h5"
    process = start(output, steps=60)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return output


def test_a_killed_run_leaves_every_step_before_and_diff_says_what_is_missing(tmp_path: Path, whole: Path) -> None:
    output = tmp_path / "killed.h5"
    process = start(output, steps=20_000)
    try:
        wait_for_steps(output, 5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with open_trace(output) as killed:
        last = killed.last_step
        assert last >= 5
        assert killed.steps == tuple(range(last + 1))
    checked = trace("check", output)
    assert checked.returncode == 2
    assert f"whatever came after step {last} is missing" in checked.stdout
    compared = trace("diff", output, whole)
    assert compared.stdout.startswith("SAME"), compared.stdout
    assert compared.returncode == 0
    if last < 60:
        assert "a is unfinished: ends after step" in " ".join(compared.stdout.split())


def test_a_full_disk_stops_the_recording_and_not_the_run(tmp_path: Path) -> None:
    output = tmp_path / "full.h5"
    process = start(output, steps=60, limit=14_000_000)
    _, stderr = process.communicate()
    assert process.returncode == 0
    lines = [line for line in stderr.splitlines() if "recording stopped" in line]
    assert len(lines) == 1
    assert "File too large" in lines[0]
    assert "the run goes on" in lines[0]
    assert "Traceback" not in stderr
    with open_trace(output) as trace_:
        assert 1 <= trace_.last_step < 60
        assert not trace_.finished
    assert trace("check", output).stdout.startswith("UNFINISHED")


def wait_for_steps(output: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with open_trace(output) as growing:
                if growing.last_step >= count:
                    return
        except TraceError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"no {count} steps in {output} ({os.path.exists(output)})")
