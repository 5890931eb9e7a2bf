"""What the shell offers, asked as the shell asks: by environment variables, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders import make_trace

NAME = "model.layers.1.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trace(tmp_path_factory.mktemp("completion") / "run.h5")


def offered(line: str, cwd: Path | None = None) -> list[str]:
    """Words that bash would offer at the end of a line."""
    words = line.split(" ")
    root = str(Path(__file__).parents[2])
    asked = {"_TRACE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    environment = {**os.environ, "PYTHONPATH": root, **asked}
    command = [sys.executable, "-c", "from tracer.cli.main import main; main()"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    assert done.stderr == ""
    return [word.partition(",")[2] for word in done.stdout.splitlines() if word]


def test_commands_are_offered() -> None:
    assert {"record", "diff", "show", "check"} <= set(offered("trace "))
    assert offered("trace di") == ["diff"]


def test_steps_phases_and_names_of_the_file_are_offered(trace: Path) -> None:
    assert offered(f"trace show {trace} ") == ["0", "1", "2", "3"]
    assert offered(f"trace show {trace} 0 ") == ["init"]
    assert offered(f"trace show {trace} 1 clip") == ["clipped_grad"]
    assert offered(f"trace show {trace} 1 grad model.layers.1.self_attn.q_proj.lora_B") == [NAME]
    assert "loss" in offered(f"trace show {trace} 1 loss ")


@pytest.mark.parametrize("line", ["missing.h5 ", "missing.h5 1 ", "missing.h5 1 grad ", "noise.h5 "])
def test_a_file_that_cannot_be_read_offers_nothing_and_says_nothing(line: str, tmp_path: Path) -> None:
    (tmp_path / "noise.h5").write_bytes(b"noise")
    assert offered(f"trace show {line}", tmp_path) == []


def test_a_step_or_phase_that_is_not_there_offers_nothing(trace: Path) -> None:
    assert offered(f"trace show {trace} 77 ") == []
    assert offered(f"trace show {trace} 1 nonsense ") == []


def test_a_list_of_phases_is_continued(trace: Path) -> None:
    assert offered("trace record --what gr") == ["grad"]
    assert offered("trace record --what grad,pa") == ["grad,param"]
    assert offered("trace diff a b --phases grad,pa") == ["grad,param"]


def test_kinds_of_reports_are_offered() -> None:
    assert offered("trace diff a b --report ju") == ["junit="]


def test_no_tensor_is_read_for_a_name(trace: Path) -> None:
    import click

    from tracer.cli.completion import complete_name
    from tracer.cli.show import show
    from tracer.reader import Trace

    read: list[int] = []
    original = Trace.pread

    def counting(self: Trace, offset: int, count: int) -> bytes:
        read.append(count)
        return original(self, offset, count)

    context = click.Context(show)
    context.params = {"file": trace, "step": 1, "phase": "grad"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trace, "pread", counting)
        assert complete_name(context, show.params[-1], NAME)[0].value == NAME
    assert sum(read) == 0
