"""Exit codes in every form, closed pipes, Ctrl-C, and what a terminal is shown that a pipe is not."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

from differ.reporters import FILES, FORMATS
from tests.builders import make_trace
from tests.differ.terminal import Terminal, deaf, heard, run, screen, seen, terminal
from tests.differ.test_gate import PROGRAM, project
from tests.tracer.test_live import wait_for_steps
from tracer.reader import open_trace

ROOT = Path(__file__).parents[2]
# Arguments after a and b that give each exit code.
ENDINGS = {"same": (0, "a.h5"), "diverged": (1, "b.h5"), "incomparable": (2, "a.h5", "--only", "nothing")}
BEGINNINGS = {"text": "DIVERGED at", "json": "{\n", "markdown": "## ❌", "junit": "<?xml", "html": "<!doctype html>"}
SLOW_STEPS = 200
# `trace` whose comparison takes its time, however fast the machine is: 10 s for the traces of `slow`.
SLOWLY = """
import time
from differ.engine import _Engine
from tracer.cli.main import main
compare = _Engine._compare_step
_Engine._compare_step = lambda self, step: (time.sleep(0.05), compare(self, step))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("traces")
    make_trace(made / "a.h5")
    make_trace(made / "b.h5", fault="clip_value")
    return made


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two traces of many steps."""
    made = tmp_path_factory.mktemp("slow")
    one = make_trace(made / "a.h5", steps=SLOW_STEPS)
    return one, make_trace(made / "b.h5", steps=SLOW_STEPS, fault="lr")


def start(*arguments: object, program: tuple[str, ...] = ("-m", "tracer"), **streams: object) -> subprocess.Popen[str]:
    # pytest-xdist tells its workers a width; a shell does not, and the terminal's own is what counts.
    bare = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    environment = {**bare, "PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **streams)  # type: ignore[call-overload, no-any-return]


def on(at: Terminal, *arguments: object, cwd: Path | None = None, **how: object) -> subprocess.Popen[str]:
    """A process that has a terminal for everything, as a shell would start it: ^C typed there is a signal."""

    def take() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    return start(*arguments, cwd=cwd, stdin=at.slave, stdout=at.slave, stderr=at.slave, preexec_fn=take, **how)


# Exit codes


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("form", FORMATS)
def test_the_exit_code_is_the_verdict_s_in_every_form(folder: Path, form: str, ending: str) -> None:
    code, *arguments = ENDINGS[ending]
    done, out, err = heard("diff", "a.h5", *arguments, "--format", form, cwd=folder)
    assert done == code, err
    assert "internal" not in err
    assert out


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_exit_code_is_the_verdict_s_with_every_report_and_quiet(folder: Path, tmp_path: Path, ending: str) -> None:
    code, *arguments = ENDINGS[ending]
    for kind in FILES:
        destination = tmp_path / kind
        done, out, err = heard("diff", "a.h5", *arguments, "-q", "--report", f"{kind}={destination}", cwd=folder)
        assert (done, out, err) == (code, "", "")
        if ending == "diverged":
            assert destination.read_text().startswith(BEGINNINGS[kind])


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_is_missing_is_2_in_every_form_and_no_report_is_written(
    folder: Path, tmp_path: Path, form: str
) -> None:
    done, out, err = heard(
        "diff", "a.h5", "missing.h5", "--format", form, "--report", f"html={tmp_path / 'x.html'}", cwd=folder
    )
    assert (done, out, err.count("\n")) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []


# Closed pipes


@pytest.mark.parametrize("form", FORMATS)
def test_a_closed_pipe_is_2_never_1_and_the_reports_are_written(folder: Path, tmp_path: Path, form: str) -> None:
    with deaf() as out:
        said = io.StringIO()
        arguments = ("--format", form, "--report", f"json={tmp_path / 'x.json'}")
        code = run("diff", folder / "a.h5", folder / "b.h5", *arguments, stdout=out, stderr=said)
    assert code == 2
    assert "internal" not in said.getvalue()
    assert json.loads((tmp_path / "x.json").read_text())["verdict"] == "diverged"


def test_a_closed_pipe_is_2_for_help_show_and_errors_too(folder: Path, tmp_path: Path) -> None:
    for arguments in (("--help",), ("show", folder / "a.h5"), ("diff", "missing.h5", folder / "a.h5")):
        with deaf() as out, deaf() as err:
            assert run(*arguments, stdout=out, stderr=err, cwd=tmp_path) == 2


def test_a_process_whose_streams_are_closed_pipes_ends_with_2_and_not_120(folder: Path) -> None:
    with deaf() as closed:
        done = start("diff", folder / "a.h5", folder / "b.h5", stdout=closed, stderr=closed)
        assert done.wait(60) == 2


def test_a_process_without_streams_still_has_an_exit_code(folder: Path) -> None:
    def close() -> None:
        os.closerange(1, 3)

    assert start("diff", folder / "a.h5", folder / "b.h5", preexec_fn=close).wait(60) == 1


def test_a_gate_into_a_closed_pipe_is_2(folder: Path, tmp_path: Path) -> None:
    project(tmp_path)
    assert heard("gate", "--update", cwd=tmp_path, PYTHONPATH=str(ROOT))[0] == 1
    with deaf() as out:
        assert run("gate", stdout=out, stderr=io.StringIO(), cwd=tmp_path, PYTHONPATH=str(ROOT)) == 2


# Ctrl-C


@pytest.mark.parametrize("form", FORMATS)
def test_an_interrupted_comparison_is_130_and_one_line_in_every_form(
    folder: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object, step: int) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("differ.engine._Engine._compare_step", interrupt)
    reports = [word for kind in FILES for word in ("--report", f"{kind}={tmp_path / kind}")]
    done = heard("diff", "a.h5", "b.h5", "--format", form, *reports, cwd=folder)
    assert done == (130, "", "trace: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_erases_the_bar_and_leaves_one_line(slow: tuple[Path, Path]) -> None:
    with terminal() as at:
        process = on(at, "diff", *slow, cwd=ROOT, program=("-c", f"{SLOWLY}\nmain()"))
        at.wait_for(f"of {SLOW_STEPS + 1}")
        at.type("\x03")
        code = process.wait(60)
        said = at.said()
    assert code == 130
    assert [line for line in screen(said) if line != "^C"] == ["trace: interrupted"]
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor is shown again"


def test_an_interrupted_comparison_in_a_pipe_is_130_and_one_line(slow: tuple[Path, Path]) -> None:
    code = (
        f"{SLOWLY}import os, signal\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.4)\n"
        f"main(['diff', {str(slow[0])!r}, {str(slow[1])!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "trace: interrupted\n")


@pytest.mark.parametrize("options", [(), ("--fingerprint",), ("--twin",)])
def test_an_interrupted_recording_is_130_one_line_more_and_an_unfinished_trace(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    program = tmp_path / "endless.py"
    program.write_text("from tests.driven import drive\ndrive(steps=10**9)\n")
    output = tmp_path / "run.h5"
    process = start("record", *options, "-o", output, "--", program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for_steps(output, 3)
    finally:
        # A terminal tells the whole group; `kill -INT` tells one process, which has to tell the one that it started.
        os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    began, ended = err.splitlines()
    assert began.startswith(f"trace: recording {output.name}: ")
    assert ended.startswith(f"trace: interrupted, wrote {output}: ")
    assert ended.endswith(", unfinished")
    with open_trace(output) as trace:
        assert not trace.finished
        assert trace.end["reason"] == "interrupted"
        assert trace.last_step >= 3
        assert trace.fingerprint == (options == ("--fingerprint",))
    assert heard("check", output)[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["endless.py", "run.h5"]


def test_an_interrupted_gate_is_130_and_leaves_nothing(tmp_path: Path) -> None:
    project(tmp_path)
    program = tmp_path / "endless.py"
    program.write_text("from tests.driven import drive\ndrive(steps=10**9)\n")
    table = (tmp_path / "pyproject.toml").read_text().replace(str(PROGRAM), str(program))
    (tmp_path / "pyproject.toml").write_text(table)
    with terminal() as at:
        process = on(at, "gate", "--update", cwd=tmp_path)
        at.wait_for("recording")
        at.type("\x03")
        code = process.wait(60)
        lines = screen(at.said())
    assert code == 130
    assert lines[-1] == "trace: interrupted"
    assert lines[0].startswith("trace: gate lora: recording")
    assert not (tmp_path / "traces").exists()


# Colour and columns


COLOURS: dict[str, tuple[dict[str, str], bool]] = {
    "a terminal": ({}, True),
    "a terminal, FORCE_COLOR": ({"FORCE_COLOR": "1"}, True),
    "NO_COLOR": ({"NO_COLOR": "1"}, False),
    "NO_COLOR wins": ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
    "an empty NO_COLOR says nothing": ({"NO_COLOR": ""}, True),
    "TERM=dumb": ({"TERM": "dumb"}, False),
    "TERM=dumb, FORCE_COLOR": ({"TERM": "dumb", "FORCE_COLOR": "1"}, False),
}


@pytest.mark.parametrize("case", COLOURS)
def test_colour_on_a_terminal(folder: Path, case: str) -> None:
    env, coloured = COLOURS[case]
    code, out, _ = seen("diff", folder / "a.h5", folder / "b.h5", **env)
    assert code == 1
    assert ("\x1b[1;31mDIVERGED\x1b[0m" in out) == coloured
    assert ("\x1b" in out) == coloured
    assert screen(out)[0].startswith("DIVERGED at step 1, clipped_grad")


@pytest.mark.parametrize("form", FORMATS)
def test_no_colour_and_no_bar_in_a_pipe_whatever_the_environment_says(folder: Path, form: str, impatient: None) -> None:
    code, out, err = heard("diff", "a.h5", "b.h5", "--format", form, cwd=folder, FORCE_COLOR="1", CLICOLOR_FORCE="1")
    assert code == 1
    assert "\x1b" not in out + err


def test_a_document_on_a_terminal_has_no_colour(folder: Path) -> None:
    _, out, _ = seen("diff", folder / "a.h5", folder / "b.h5", "--format", "json")
    assert json.loads(out)["verdict"] == "diverged"


@pytest.mark.parametrize(("columns", "widest"), [("60", 60), ("80", 80), ("400", 120)])
def test_columns_decide_how_wide_a_report_is(folder: Path, columns: str, widest: int) -> None:
    _, out, _ = heard("diff", "a.h5", "b.h5", cwd=folder, COLUMNS=columns)
    lengths = [len(line) for line in out.splitlines()]
    assert widest - 20 < max(lengths) <= widest
    assert heard("diff", "a.h5", "a.h5", cwd=folder, COLUMNS="nonsense")[0] == 0


def test_a_terminal_s_own_width_is_used_and_the_whole_report_is_there(folder: Path) -> None:
    with terminal(72) as at:
        assert on(at, "diff", "a.h5", "b.h5", cwd=folder).wait(60) == 1
        lines = screen(at.said())
    _, piped, _ = heard("diff", "a.h5", "b.h5", cwd=folder, COLUMNS="72")
    assert lines == piped.splitlines()


# Progress


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars appear at once."""
    monkeypatch.setattr("differ.terminal.PATIENCE", 0.0)


def test_a_bar_counts_steps_on_standard_error_and_is_erased(folder: Path, impatient: None) -> None:
    code, out, err = seen("diff", folder / "a.h5", folder / "b.h5")
    assert code == 1
    assert "comparing, step" in err
    assert "4 of 4" in err
    assert screen(err) == []
    assert "comparing" not in out


def test_a_comparison_that_takes_no_time_shows_no_bar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("differ.terminal.PATIENCE", 3600.0)
    assert seen("diff", folder / "a.h5", folder / "b.h5")[2] == ""


def test_a_bar_has_no_colour_with_no_color(folder: Path, impatient: None) -> None:
    _, _, err = seen("diff", folder / "a.h5", folder / "b.h5", NO_COLOR="1", FORCE_COLOR="1")
    assert "comparing, step" in err
    assert "\x1b[3" not in err


@pytest.mark.parametrize(
    ("options", "env"), [(("-q",), {}), ((), {"TERM": "dumb"}), ((), {"TERM": "dumb", "FORCE_COLOR": "1"})]
)
def test_no_bar_when_quiet_or_on_a_dumb_terminal(
    folder: Path, impatient: None, options: tuple[str, ...], env: dict[str, str]
) -> None:
    code, _, err = seen("diff", folder / "a.h5", folder / "b.h5", *options, **env)
    assert (code, err) == (1, "")


def test_progress_goes_from_nothing_to_all_of_the_chosen_steps(folder: Path) -> None:
    from differ.engine import diff
    from differ.options import DiffOptions

    told: list[tuple[int, int]] = []
    record: Callable[[int, int], None] = lambda done, total: told.append((done, total))  # noqa: E731
    diff(folder / "a.h5", folder / "b.h5", DiffOptions(steps=(1, 3), progress=record))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_pipe_never_pays_for_the_bar(folder: Path) -> None:
    code = (
        "import sys, contextlib\nfrom tracer.cli.main import main\n"
        f"with contextlib.suppress(SystemExit): main(['diff', {str(folder / 'a.h5')!r}, {str(folder / 'b.h5')!r}, '-q'])\n"
        "print(sorted({'rich', 'torch', 'mlx', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_several_gates_say_which_of_them_runs(folder: Path, tmp_path: Path) -> None:
    project(tmp_path, "--die")
    project(tmp_path, "--die", name="two", baseline="traces/two.h5")
    _, _, err = heard("gate", "--update", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "trace: gate lora (1 of 2): recording python" in err
    assert "trace: gate two (2 of 2): recording python" in err
