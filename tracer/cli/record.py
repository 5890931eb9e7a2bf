"""`trace record`: run a program with the recorder around it.

The program runs in this very process, as `python` would have run it, so that its imports can be hooked when it makes
them; a built-in training path runs in a process of its own.  The program's exit code is ours.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import click

from tracer.children import children_recorded
from tracer.cli.options import Phases, inside_of_the_model, long_runs, narrowing
from tracer.cli.ranks import ranks_recorded
from tracer.cli.twin import Kinds, TwinOptions, record_twins
from tracer.errors import BadUsage, NotFound, NothingRecorded
from tracer.interpreters import find, lent
from tracer.perturb import Perturbation
from tracer.recorder import DEFAULT_PHASES, FORWARD_ROWS, INTERRUPTED, Recorder, recording
from tracer.schema import Phase
from tracer.size import human_bytes
from tracer.thinning import LongRun

EXIT_INTERRUPTED: Final = 130
# The program that runs a built-in path, by name: nothing here may import it.
BUILT_IN: Final = ("-m", "scenarios.run")
# How long a program of its own process may take to end after Ctrl-C before it is told by us, seconds.  In a terminal it
# was told when we were.
GRACE: Final = 2.0
_PYTHON: Final = re.compile(r"python(\d+(\.\d+)?)?(\.exe)?$")


@click.command(context_settings={"ignore_unknown_options": False})
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The trace to write."
)
@click.option("--what", type=Phases(), help="Phases to record, with commas, or all (default: all but forward).")
@narrowing
@inside_of_the_model
@long_runs
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@click.option("--durable", is_flag=True, help="fsync after every step: safe against power loss, slower.")
@click.option("--fingerprint", is_flag=True, help="Keep sketches in place of tensors: small, for a baseline in git.")
@click.option("--path", "path_name", metavar="NAME", help="Run a built-in training path instead of a program.")
@click.option("--python", metavar="PYTHON", help="With --path: run it under the interpreter of another environment.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings of --path, as TOML.")
@click.option("--model", metavar="NAME", help="With --path: a tiny model, a local folder, or a hub id.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="With --path: change one setting.")
@click.option(
    "--init-from", type=click.Path(path_type=Path), metavar="TRACE", help="With --path: start from its adapters."
)
@click.option(
    "--batches-from", type=click.Path(path_type=Path), metavar="TRACE", help="With --path: train on its batches."
)
@click.option(
    "--twin", is_flag=True, help="Run again from a start one rounding unit away, into FILE.twin: the noise floor."
)
@click.option(
    "--twin-by",
    type=Kinds(),
    multiple=True,
    metavar="KIND",
    help="What the twin changes: rounding (default), threads, eager (repeatable, or with commas).",
)
@click.option("--twins", type=click.IntRange(1), metavar="N", help="Make N rounding twins, each with its own seed.")
@click.option(
    "--perturb-base", is_flag=True, help="Rounding twins move frozen float32 weights too (16-bit ones always)."
)
@click.option("--as-twin", metavar="KIND", hidden=True, help="This run is the twin of another.")
@click.option(
    "--perturb", type=click.IntRange(0), metavar="SEED", hidden=True, help="Move the start by one rounding unit."
)
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
def record(output: Path, path_name: str | None, program: tuple[str, ...], **options: Any) -> int:
    """Run a training program and record every optimizer step into FILE.

    \b
    trace record -o run.h5 -- python train.py --lr 1e-4
    trace record -o run.h5 -- -m mlx_lm lora --config lora.yaml
    trace record -o run.h5 -- torchrun --nproc-per-node 2 train.py
    trace record -o run.h5 --path mlx-lm --config run.toml
    trace record --twin -o run.h5 -- python train.py

    The program is not changed, and neither is a bit of what it computes.  Ends with the program's exit code, or 2 if it made
    no optimizer step that could be seen.
    """
    _check_phases(options)
    twins = _twin_options(options)
    of_paths = ("config", "model", "settings", "init_from", "batches_from", "python")
    path_only = {name: options.pop(name) for name in of_paths}
    if path_name is not None:
        if program:
            raise BadUsage("--path and a program were given", "one of them")
        program = (*BUILT_IN, path_name, *_path_arguments(path_only))
        other = path_only["python"]
        return _in_processes(str(find(other)) if other else sys.executable, output, options, program, twins)
    given = [f"--{name.replace('_', '-')}" for name, value in path_only.items() if value]
    if given:
        raise BadUsage(f"{', '.join(given)} needs --path", "a program of your own reads its own settings")
    if not program:
        raise BadUsage("no program was given", "trace record -o run.h5 -- python train.py")
    asked = program
    python, program = _split_interpreter(program)
    # What an interpreter was named for is Python, whatever its name says.
    is_python = program != asked
    elsewhere = python is not None and Path(python).parent != Path(sys.executable).parent
    if elsewhere or twins is not None:
        interpreter = python if elsewhere and python is not None else sys.executable
        return _in_processes(interpreter, output, options, (*["python"] * is_python, *program), twins)
    return _record_here(output, options, program, is_python=is_python)


def _check_phases(options: Mapping[str, Any]) -> None:
    """Refuse a detail of a phase that is not recorded.  Raises BadUsage."""
    what = options["what"] or DEFAULT_PHASES
    for option, phase in (("modules", Phase.FORWARD), ("micro_grads", Phase.GRAD), ("token_loss", Phase.LOSS)):
        if options[option] and phase not in what:
            raise BadUsage(
                f"--{option.replace('_', '-')} needs phase {phase.label}",
                f"give --what all, or a list with {phase.label}",
            )


def _twin_options(options: dict[str, Any]) -> TwinOptions | None:
    """Take the options about twins out of `options` and leave there what a run of its own is told: `twin`."""
    asked, kinds, count = options.pop("twin"), options.pop("twin_by"), options.pop("twins")
    base, seed, by = options.pop("perturb_base"), options.pop("perturb"), options.pop("as_twin")
    options["twin"] = None
    if by is not None or seed is not None:
        options["twin"] = Perturbation(by or "rounding", seed, base)
        return None
    if base and not (asked or kinds or count):
        raise BadUsage("--perturb-base needs --twin", "a run of your own is never changed")
    if not (asked or kinds or count):
        return None
    named = tuple(kind for group in kinds for kind in group)
    if not named or (count and "rounding" not in named):
        named = ("rounding", *named)
    return TwinOptions(named, count or 1, base)


def _in_processes(
    python: str, output: Path, options: dict[str, Any], program: tuple[str, ...], twins: TwinOptions | None
) -> int:
    """Record in a process of its own, and the twins each in another."""

    def run(trace: Path, twin: Perturbation | None, environment: Mapping[str, str]) -> int:
        return _in_process_of_its_own(python, trace, {**options, "twin": twin}, program, environment)

    if twins is None:
        return run(output, options["twin"], {})
    return record_twins(output, twins, run, force=options["force"])


def _record_here(output: Path, options: dict[str, Any], program: tuple[str, ...], *, is_python: bool) -> int:
    start = _find_program(program, is_python=is_python)
    code = 0
    how = _how(options)
    try:
        with children_recorded(output, how), recording(output, **how) as recorder:
            code = _exit_code(start)
            if code:
                recorder.cut_off(
                    INTERRUPTED if code == EXIT_INTERRUPTED else f"the program ended with exit code {code}"
                )
        sys.stdout.flush()
    except NothingRecorded:
        if ranks_recorded(output, fingerprint=options["fingerprint"]):
            return code
        if code == 0:
            raise
        # The program failed before it could train: its own exit code says more than ours, and a built-in path its own error.
        if program[:2] != BUILT_IN:
            print(f"trace: {_failed_early(output, code).line()}", file=sys.stderr)
        return code
    # A launcher that was interrupted has closed a trace of its own, which would hide those of its ranks.
    if not recorder.steps_recorded and ranks_recorded(output, fingerprint=options["fingerprint"]):
        return code
    if options["fingerprint"] and recorder.steps_recorded:
        from tracer.shrink import shrink_in_place

        shrink_in_place(recorder.path)
    _report(recorder, code)
    return code


def _failed_early(output: Path, code: int) -> NothingRecorded:
    """What to say of a program that failed: that comes before reasons why its steps might be hidden."""
    return NothingRecorded(
        f"{output.name}: the program ended with exit code {code}, and no optimizer step was seen before that",
        "mend the program, and record it again",
    )


def _how(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the command as those of `tracer.record`."""
    same = ("steps", "only", "omit", "durable", "twin", "modules", "forward_rows", "micro_grads", "token_loss")
    return {
        "what": options["what"] or DEFAULT_PHASES,
        "names": _user_names(),
        "overwrite": options["force"],
        "long": _long_run(options),
        "announce": True,
        **{name: options[name] for name in same},
    }


def _long_run(options: Mapping[str, Any]) -> LongRun:
    return LongRun(options["full_steps"], options["around"], options["spike"], options["max_size"])


def _user_names() -> Any:
    """`[tool.trace.names]` of the pyproject.toml in the current folder."""
    import tomllib

    from tracer.errors import BadConfig
    from tracer.names import parse_rules

    path = Path("pyproject.toml")
    if not path.is_file():
        return ()
    try:
        table = tomllib.loads(path.read_text()).get("tool", {}).get("trace", {}).get("names", {})
        return parse_rules(table)
    except (ValueError, AttributeError, UnicodeDecodeError) as error:
        raise BadConfig(f"[tool.trace.names] in {path}: {error}", "mend the table") from error


def _path_arguments(options: dict[str, Any]) -> list[str]:
    arguments = []
    for name in ("config", "model", "init_from", "batches_from"):
        if options[name] is not None:
            arguments += [f"--{name.replace('_', '-')}", str(options[name])]
    for setting in options["settings"]:
        arguments += ["--set", setting]
    return arguments


def _in_process_of_its_own(
    python: str, output: Path, options: dict[str, Any], program: tuple[str, ...], environment: Mapping[str, str]
) -> int:
    """The same command under another interpreter, or just in another process; `environment` is added to ours."""
    command = [python, "-m", "tracer", "record", "-o", str(output)]
    if options["what"]:
        command += ["--what", ",".join(phase.label for phase in sorted(options["what"]))]
    if options["steps"]:
        command += ["--steps", ":".join(map(str, options["steps"]))]
    for name in ("only", "omit", "modules"):
        for glob in options[name]:
            command += [f"--{name}", glob]
    if options["forward_rows"] != FORWARD_ROWS:
        command += ["--forward-rows", str(options["forward_rows"])]
    for name in ("full_steps", "around", "spike", "max_size"):
        if options[name] is not None:
            command += [f"--{name.replace('_', '-')}", str(options[name])]
    flags = ("force", "durable", "fingerprint", "micro_grads", "token_loss")
    command += [f"--{flag.replace('_', '-')}" for flag in flags if options[flag]]
    twin: Perturbation | None = options["twin"]
    if twin is not None:
        command += ["--as-twin", twin.by, *(["--perturb", str(twin.seed)] if twin.seed is not None else [])]
        command += ["--perturb-base"] * twin.base
    with lent(python) as ours:
        given = {**os.environ, **environment, **ours}
        return _shell_code(_wait(subprocess.Popen([*command, "--", *program], env=given)))


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Exit code of a process.  After Ctrl-C it closes its trace and says so; a second one ends it."""
    try:
        try:
            return process.wait()
        except KeyboardInterrupt:
            try:
                return process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


def _shell_code(code: int) -> int:
    """A process that died of signal n has code 128 + n, as in a shell."""
    return 128 - code if code < 0 else code


def _split_interpreter(program: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Split a leading interpreter off: (its path, the rest).

    A bare `python` means the one that runs us, so that `.venv/bin/trace record -- python x.py` needs no activated
    environment; one that is given with a folder means just that one.
    """
    first = program[0]
    if not _PYTHON.search(Path(first).name):
        return None, program
    if len(program) == 1:
        raise BadUsage("an interpreter was given, and nothing to run", "trace record -o run.h5 -- python train.py")
    if Path(first).name == first:
        return None, program[1:]
    if not Path(first).is_file():
        raise NotFound(f"{first} was not found", "check the path of the interpreter")
    return str(Path(first).absolute()), program[1:]


def _find_program(program: tuple[str, ...], *, is_python: bool) -> Callable[[], object]:
    """What will run the program as the interpreter would.  `is_python`: an interpreter was named for it."""
    first, rest = program[0], list(program[1:])
    if first == "-m":
        if not rest:
            raise BadUsage("-m needs the name of a module", "trace record -o run.h5 -- -m mlx_lm lora --config c.yaml")
        return lambda: _run_module(rest[0], rest[1:])
    if first == "-c":
        raise BadUsage("-c cannot be recorded", "put the code into a file")
    if first.startswith("-"):
        raise BadUsage(f"the interpreter option {first} is not supported", "set it through PYTHON* variables")
    script = Path(first)
    if not script.exists():
        # A console script of the environment that we run in is found without that being activated.
        found = shutil.which(first) or shutil.which(first, path=str(Path(sys.executable).parent))
        if found is None:
            raise NotFound(f"{first} was not found", "give a Python script, -m module, or a Python console command")
        script = Path(found)
    if not is_python and not script.is_dir() and script.suffix != ".py" and not _is_python(script):
        raise BadUsage(
            f"{script} is not a Python program",
            f"record what it starts; if it is one: trace record -o run.h5 -- python {shlex.quote(first)}",
        )
    return lambda: _run_script(script, rest)


def _is_python(script: Path) -> bool:
    with script.open("rb") as file:
        head = file.readline(400)
        # Console scripts with long paths start with /bin/sh and name the interpreter in the second line.
        return head.startswith(b"#!") and (b"python" in head or b"python" in file.readline(400))


def _run_module(module: str, arguments: list[str]) -> object:
    sys.argv = [module, *arguments]
    sys.path[0] = str(Path.cwd())
    return runpy.run_module(module, run_name="__main__", alter_sys=True)


def _run_script(script: Path, arguments: list[str]) -> object:
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    return runpy.run_path(str(script), run_name="__main__")


def _exit_code(start: Callable[[], object]) -> int:
    """Run the program; its exit code.  A traceback of the program's is shown without our own frames."""
    try:
        start()
    except SystemExit as stop:
        if stop.code is None:
            return 0
        if isinstance(stop.code, int):
            return stop.code
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BaseException as error:  # noqa: BLE001 - whatever the program dies of, the trace is closed properly
        traceback.print_exception(type(error), error, _own_frames(error.__traceback__))
        return 1
    return 0


def _own_frames(at: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that is the program's: after the frames of this module and of runpy."""
    while at is not None and (
        at.tb_frame.f_code.co_filename == __file__ or at.tb_frame.f_globals.get("__name__") == "runpy"
    ):
        at = at.tb_next
    return at


def _report(recorder: Recorder, code: int) -> None:
    begun = "interrupted, " if code == EXIT_INTERRUPTED else ""
    wrote = "wrote nothing"
    if recorder.path.exists():
        steps, size = recorder.steps_recorded, human_bytes(os.path.getsize(recorder.path))
        wrote = f"wrote {recorder.path}: {steps} step{'s' * (steps != 1)}, {size}"
    end = ", unfinished" if code or recorder.failure else ""
    print(f"trace: {begun}{wrote}{end}", file=sys.stderr)
