"""`trace`: a group of commands that are known by name and imported when called.

`main` is the only place that prints an error and chooses an exit code for it: 0 same, 1 diverged and nothing
else, 2 no answer, 130 Ctrl-C.  Ctrl-C and a closed pipe never reach click, which would print lines of its own and exit 1.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any, Final, NoReturn, TextIO

import click

from tracer._version import DISTRIBUTION, VERSION
from tracer.errors import TraceError
from tracer.loading import without_collection

# Command -> where it is, and its line in `trace --help`, which must not import it.
COMMANDS: Final = {
    "record": ("tracer.cli.record:record", "Run a training program and record every optimizer step."),
    "diff": ("differ.command:diff", "Name the first step, phase and parameter at which two traces part."),
    "calibrate": ("differ.calibrate_command:calibrate", "Fit tolerances to the noise of a run and its twins."),
    "show": ("tracer.cli.show:show", "What is in a trace: steps, records, statistics, values."),
    "check": ("tracer.cli.check:check", "Is a trace whole; what was lost."),
    "verify": ("scenarios.reference.command:verify", "Does every step follow from its inputs, recomputed in torch."),
    "shrink": ("tracer.cli.shrink:shrink", "Make a fingerprint of a trace, small enough for git."),
    "export": ("tracer.cli.export:export", "TensorBoard scalars of a trace, or the tensors of a step."),
    "gate": ("differ.gate_command:gate", "Run and compare the baselines in [tool.trace.gate.*]."),
    "bisect": ("scenarios.bisect.command:bisect", "Find the settings that make one run diverge from another."),
    "sweep": ("scenarios.sweep.command:sweep", "Run settings times seeds, and say how often each agrees."),
    "paths": ("scenarios.paths_command:paths", "Which training paths work here, and what the others need."),
    "selftest": ("scenarios.selftest:selftest", "Is a recorded run bit-identical to an unrecorded one, here?"),
    "scenarios": ("scenarios.scenarios_command:scenarios", "Known divergences, each as a runnable pair."),
}

EXIT_NO_ANSWER: Final = 2
EXIT_INTERRUPTED: Final = 130


class _Interrupted(Exception):
    """Ctrl-C, on its way past click."""


class _Unwritable(Exception):
    """Standard output or error took no more: a closed pipe, a full disk."""


class LazyGroup(click.Group):
    """A click group whose commands are imported on first use."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments; `--help` and completion print here."""
        with _past_click():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with _past_click():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Command names in the order of COMMANDS."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name][0].partition(":")
        with without_collection():
            command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@contextlib.contextmanager
def _past_click() -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, click.Abort) as error:
        raise _Interrupted from error
    except BrokenPipeError as error:
        raise _Unwritable from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name=DISTRIBUTION)
def trace() -> None:
    """Record training runs step by step, and name the first place where two of them part.

    \b
    trace record -o a.h5 -- python train.py
    trace record -o b.h5 -- -m mlx_lm lora --config lora.yaml
    trace diff a.h5 b.h5

    Exit codes: 0 same, 1 diverged, 2 no answer (usage, unreadable file, nothing in common), 130 Ctrl-C.
    `trace record` ends with the exit code of the program that it ran.
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    _open_streams()
    code: Any = EXIT_NO_ANSWER
    try:
        code = _run(arguments)
    except KeyboardInterrupt:
        code = _interrupted()
    except OSError:
        pass  # the line that says what went wrong could not be written either
    if not (_settled(sys.stdout) & _settled(sys.stderr)) and code in (0, 1):
        code = EXIT_NO_ANSWER
    sys.exit(code if isinstance(code, int) else 0)


def _run(arguments: list[str] | None) -> Any:
    """Run a command; its exit code.  Prints an error's line; raises OSError where that cannot be written."""
    try:
        return trace.main(arguments, prog_name="trace", standalone_mode=False)
    except TraceError as error:
        return _complain(error.line(), error.exit_code)
    except click.ClickException as error:
        error.show(sys.stderr)
        return EXIT_NO_ANSWER
    except (_Interrupted, click.Abort):
        return _interrupted()
    except _Unwritable:
        # Whoever read our output has seen enough.
        return EXIT_NO_ANSWER
    except Exception as error:
        if os.environ.get("STEPTRACE_DEBUG"):
            raise
        return _complain(
            f"internal error: {type(error).__name__}: {' '.join(str(error).split())}; "
            "set STEPTRACE_DEBUG=1 for a traceback, and report it [internal]",
            EXIT_NO_ANSWER,
        )


def _open_streams() -> None:
    """Give a process that was started without standard streams (`>&-`) ones that lead nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for the rest of the process


def _settled(stream: TextIO) -> bool:
    """Write what a stream still holds; if it takes no more, lead it nowhere, or the interpreter would exit with 120."""
    try:
        stream.flush()
        return True
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False


def _interrupted() -> int:
    # A terminal shows ^C where the cursor was: the line begins below.
    return _complain("interrupted", EXIT_INTERRUPTED, start="\n" * sys.stderr.isatty())


def _complain(line: str, code: int, start: str = "") -> int:
    print(f"{start}trace: {line}", file=sys.stderr)
    return code
