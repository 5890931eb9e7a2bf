"""The command line: exit codes, one-line errors, programs run as the interpreter would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tracer.test_file import write
from tracer.cli.main import COMMANDS
from tracer.reader import open_trace
from tracer.size import human_bytes

ROOT = Path(__file__).parents[2]


def trace(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracer", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def only_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text


def test_help_names_every_command_and_imports_no_framework() -> None:
    done = trace("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    code = "import sys, contextlib\nsys.argv=['trace','--help']\nfrom tracer.cli.main import main\n"
    code += "with contextlib.suppress(SystemExit): main()\n"
    code += "print(sorted({'torch','mlx','transformers','peft','h5py','numpy','rich'} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert loaded.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = trace(command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"trace {command}" in done.stdout.split("Options:")[0].replace("Usage: trace", "", 1)


def test_an_unknown_command_or_option_is_exit_code_2() -> None:
    assert trace("nonsense").returncode == 2
    assert trace("show", "--nonsense").returncode == 2
    assert trace("record", "-o", "x.h5", "--what", "grads", "--", "x.py").returncode == 2


@pytest.mark.parametrize("command", ["show", "check"])
def test_bad_files_are_one_line_on_stderr_and_exit_code_2(tmp_path: Path, command: str) -> None:
    (tmp_path / "text.h5").write_text("no trace")
    for name in ("missing.h5", "text.h5", "."):
        done = trace(command, tmp_path / name)
        assert done.returncode == 2
        assert done.stdout == ""
        assert only_line(done.stderr).startswith("trace: ")


def test_show_goes_from_the_file_to_the_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    overview = trace("show", path).stdout
    assert "steps  0–5, finished" in overview
    assert "lora.rank" in overview
    assert "clipped_grad" in overview
    step = trace("show", path, 2).stdout
    assert "4 by reference" in step
    table = trace("show", path, 0, "init").stdout
    assert "3x6" in table
    assert "digest" in next(line for line in table.splitlines() if line.startswith("  frozen"))
    values = trace("show", path, 0, "init", "zeros").stdout
    assert "zero" in values
    assert "[0. 0. 0.]" in values


def test_show_says_what_there_is_when_asked_for_what_there_is_not(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    assert "it has steps 0–5" in only_line(trace("show", path, 9).stderr)
    assert "phases are" in only_line(trace("show", path, 1, "gradient").stderr)
    assert "has no param at step 1" in only_line(trace("show", path, 1, "param").stderr)
    assert "nearest: turned" in only_line(trace("show", path, 0, "init", "turnd").stderr)


def test_check_says_whole_unfinished_or_damaged(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    whole = trace("check", path)
    assert (whole.returncode, whole.stdout.split()[0]) == (0, "WHOLE")
    cut = write(tmp_path / "b.h5", finish=False)
    unfinished = trace("check", cut)
    assert unfinished.returncode == 2
    assert "steps 0–5 are whole" in unfinished.stdout
    assert "whatever came after step 5 is missing" in unfinished.stdout


PROGRAM = """
import sys
print(sys.argv[1:], __name__, sys.path[0])
if "fail" in sys.argv:
    raise ValueError("of the program")
sys.exit(7 if "seven" in sys.argv else 0)
"""


def test_a_program_runs_as_the_interpreter_would_run_it(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = trace("record", "-o", "a.h5", "--", "python", "program.py", "--lr", "1", "seven", cwd=tmp_path)
    assert done.stdout == f"['--lr', '1', 'seven'] __main__ {tmp_path}\n"


def test_a_run_without_a_step_is_exit_code_2_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = trace("record", "-o", "a.h5", "--", "program.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "without an optimizer step that could be seen" in only_line(done.stderr)


def test_a_program_that_fails_before_its_first_step_is_said_to_have_failed(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    last = trace("record", "-o", "a.h5", "--", "program.py", "seven", cwd=tmp_path).stderr.splitlines()[-1]
    assert "a.h5: the program ended with exit code 7, and no optimizer step was seen before that" in last
    assert last.endswith("[nothing-recorded]")
    assert "compiled" not in last


def test_a_program_that_an_interpreter_is_named_for_needs_no_suffix(tmp_path: Path) -> None:
    (tmp_path / "program").write_text(PROGRAM)
    refused = trace("record", "-o", "a.h5", "--", "./program", cwd=tmp_path)
    assert "not a Python program; record what it starts; if it is one: " in only_line(refused.stderr)
    done = trace("record", "-o", "a.h5", "--", "python", "program", "seven", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (7, f"['seven'] __main__ {tmp_path}\n")
    twin = trace("record", "--twin", "-o", "b.h5", "--", "python", "program", "seven", cwd=tmp_path)
    assert (twin.returncode, twin.stdout) == (7, f"['seven'] __main__ {tmp_path}\n")


def test_a_failing_program_shows_its_own_traceback_and_keeps_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = trace("record", "-o", "a.h5", "--", "program.py", "fail", cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: of the program" in done.stderr
    assert "runpy" not in done.stderr
    assert "tracer/cli" not in done.stderr
    assert trace("record", "-o", "b.h5", "--", "program.py", "seven", cwd=tmp_path).returncode == 7


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no program was given"),
        (("--", "missing.py"), "missing.py was not found"),
        (("--", "python"), "nothing to run"),
        (("--", "-c", "print(1)"), "-c cannot be recorded"),
        (("--", "python", "-O", "x.py"), "-O is not supported"),
        (("--", "ls"), "not a Python program"),
        (("--config", "c.toml", "--", "x.py"), "--config needs --path"),
        (("--path", "mlx", "--", "x.py"), "--path and a program"),
    ],
)
def test_bad_usage_of_record_is_one_line_and_writes_no_file(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    done = trace("record", "-o", "a.h5", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert says in only_line(done.stderr)
    assert not (tmp_path / "a.h5").exists()


def test_an_existing_trace_is_replaced_only_with_force(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    (tmp_path / "program.py").write_text(PROGRAM)
    done = trace("record", "-o", "a.h5", "--", "program.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "exists already" in only_line(done.stderr)
    assert trace("check", tmp_path / "a.h5").returncode == 0


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5")
    command = f"{sys.executable} -m tracer show {path} 0 init | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""


def test_sizes_are_written_for_people() -> None:
    assert [human_bytes(n) for n in (0, 999, 1500, 2.5e7)] == ["0 bytes", "999 bytes", "1.5 kB", "25.0 MB"]


@pytest.mark.parametrize(
    ("end", "code"), [("", 0), ("raise SystemExit(0)", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)]
)
def test_a_program_that_ends_badly_leaves_an_unfinished_trace_with_all_its_steps(
    tmp_path: Path, end: str, code: int
) -> None:
    program = tmp_path / "train.py"
    program.write_text((ROOT / "tests/programs/run_of_two_steps.py").read_text() + f"\n{end}\n")
    done = trace("record", "-o", tmp_path / "run.h5", "--", program)
    assert done.returncode == code
    with open_trace(tmp_path / "run.h5") as opened:
        assert opened.steps == (0, 1, 2)
        assert opened.finished == (code == 0)
        assert opened.end["reason"] == (f"the program ended with exit code {code}" if code else "")
    assert ("unfinished" in done.stderr) == (code != 0)


def test_what_was_written_is_counted_without_the_steps_that_were_not_asked_for(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text((ROOT / "tests/programs/run_of_two_steps.py").read_text())
    for steps, count in (("2:3", "1 step,"), ("1:", "2 steps,")):
        done = trace("record", "--force", "--steps", steps, "-o", tmp_path / "run.h5", "--", program)
        assert f"wrote {tmp_path / 'run.h5'}: {count}" in done.stderr


def test_a_program_that_fails_before_it_trains_leaves_no_file_in_the_way(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text("raise SystemExit(7)\n")
    for _ in range(2):  # the second try meets nothing of the first
        done = trace("record", "-o", tmp_path / "run.h5", "--", program)
        assert done.returncode == 7
        assert "the program ended with exit code 7" in done.stderr
        assert not (tmp_path / "run.h5").exists()


def test_an_exception_inside_the_recording_block_leaves_an_unfinished_trace(tmp_path: Path) -> None:
    from tracer.recorder import recording

    def train(end: BaseException | None) -> None:
        with recording(tmp_path / "run.h5", overwrite=True) as recorder:
            for _ in range(2):
                recorder.end_step()
            if end is not None:
                raise end

    with pytest.raises(ZeroDivisionError):
        train(ZeroDivisionError())
    with open_trace(tmp_path / "run.h5") as opened:
        assert opened.end["reason"] == "the run ended with ZeroDivisionError"
    try:
        raise KeyError
    except KeyError:
        train(None)  # an exception of somebody else's is being handled: no affair of this run
    with open_trace(tmp_path / "run.h5") as opened:
        assert opened.finished


def test_an_unknown_path_is_one_line(tmp_path: Path) -> None:
    done = trace("record", "-o", tmp_path / "run.h5", "--path", "nope")
    assert done.returncode == 2
    assert "nope" in only_line(done.stderr)


def test_the_size_of_a_step_is_said_before_the_first_one(tmp_path: Path) -> None:
    done = trace("record", "-o", tmp_path / "run.h5", "--", ROOT / "tests/programs/run_of_two_steps.py")
    assert done.stderr.splitlines()[0] == "trace: recording run.h5: 2 trainable tensors, about 240 bytes a step"
