"""`trace selftest`: is a recorded run bit-identical to an unrecorded one, on this machine?

Each path trains twice from the same configuration, once alone and once under the recorder, in a process of its own, and
what the two ended with is compared by digest: every loss, the final parameters, the optimizer state, the states of the
random generators.  A recording that missed a step is a failure too: it would prove nothing.  Of a program that is run
as it is (mlx-lm-cli), what it does not leave behind cannot be compared, and is shown as such.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from scenarios.config import parse, unflatten
from scenarios.launch import Arm, run
from scenarios.outcome import PARTS
from scenarios.paths import installed_paths, path_info
from tracer.errors import PathUnavailable, TraceError
from tracer.reader import open_trace

_IDENTICAL, _DIFFERS, _NO_ANSWER = 0, 1, 2
_WIDTH: Final = 11
_LIBRARY: Final = {"train.autocast": "library", "train.checkpointing": "library", "clip.mode": "library"}
# Options of `trace record` with which everything that it knows is recorded.
_EVERYTHING: Final = ("--what", "all", "--token-loss", "--micro-grads")


@dataclass(frozen=True, slots=True)
class Report:
    """What was found for one path: part -> identical, how many steps the trace has of those made, an error instead."""

    path: str
    same: Mapping[str, bool]
    recorded: int = 0
    steps: int = 0
    error: str = ""

    @property
    def code(self) -> int:
        """0 identical, 1 differs, 2 could not be run or was not recorded whole."""
        if self.error or self.recorded != self.steps:
            return _NO_ANSWER
        return _IDENTICAL if self.same and all(self.same.values()) else _DIFFERS

    def line(self) -> str:
        """One line of the table."""
        if self.error:
            return f"{self.path:<12}could not run: {self.error}"
        words = {True: "same", False: "DIFFERS", None: "not known"}
        cells = "".join(f"{words[self.same.get(part)]:<{_WIDTH}}" for part in PARTS)
        word = {_IDENTICAL: "identical", _DIFFERS: "NOT IDENTICAL", _NO_ANSWER: "NOT RECORDED WHOLE"}[self.code]
        return f"{self.path:<12}{cells}{f'{self.recorded}/{self.steps}':<{_WIDTH}}{word}"


@click.command()
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Optimizer steps of each run.")
@click.option("--model", default="tiny-llama", show_default=True, help="Tiny model, local folder or hub id.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option("--accumulation", type=click.IntRange(1), default=1, show_default=True, help="Micro-batches a step.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True)
@click.option("--compile/--no-compile", "compile_", default=None, help="Default: what the path does by itself.")
@click.option("--library", is_flag=True, help="Autocast, checkpointing and clipping as the library does by itself.")
@click.option("--python", type=click.Path(path_type=Path), help="The interpreter of another environment.")
@click.option("--checkpointing", is_flag=True, help="Compute activations again in the backward pass.")
@click.option("--forward", is_flag=True, help="Also record module outputs, and losses and gradients in full detail.")
def selftest(
    paths: tuple[str, ...],
    steps: int,
    model: str,
    dtype: str,
    accumulation: int,
    dropout: float,
    compile_: bool | None,
    checkpointing: bool,
    forward: bool,
    library: bool,
    python: Path | None,
) -> int:
    """Check that recording changes no bit of a run: train with and without the recorder and compare.

    \b
    trace selftest                        all paths whose libraries are installed
    trace selftest mlx --steps 20 --dtype bfloat16 --no-compile
    trace selftest trl-sft --library
    trace selftest unsloth-mlx --python .venv-unsloth/bin/python

    Exit codes: 0 identical, 1 not identical, 2 a run failed or was not recorded whole.
    """
    settings = {
        "model.name": model,
        "model.dtype": dtype,
        "lora.dropout": dropout,
        "train.steps": steps,
        "train.accumulation": accumulation,
        "train.compile": "default" if compile_ is None else compile_,
        **(_LIBRARY if library else {}),
        **({"train.checkpointing": True} if checkpointing else {}),
    }
    parse(unflatten(settings))
    names = paths or (installed_paths() if python is None else _paths_of(python))
    if not names:
        raise PathUnavailable("no training library is installed", "pip install steptrace[torch] or steptrace[mlx]")
    for name in names:
        path_info(name)
    click.echo(f"{'path':<12}" + "".join(f"{part:<{_WIDTH}}" for part in (*PARTS, "recorded")) + "verdict")
    options = _EVERYTHING if forward else ()
    reports = [_show(check(name, settings, options, python=python)) for name in names]
    return max(report.code for report in reports)


def _paths_of(python: Path) -> tuple[str, ...]:
    """Paths that work under another interpreter."""
    from scenarios.paths_command import there

    return tuple(path["name"] for path in there(str(python))["paths"] if path["works"])


def check(name: str, settings: Mapping[str, Any], options: Sequence[str] = (), *, python: Path | None = None) -> Report:
    """Run one path with and without the recorder.  `options`: of `trace record`, for the recorded run."""
    arm, steps = Arm(name, settings, python=python), int(settings["train.steps"])
    try:
        if python is None:
            path_info(name).load()
        with tempfile.TemporaryDirectory(prefix="selftest-") as folder:
            alone = run(arm, Path(folder, "alone.json"))
            recorded = run(arm, Path(folder, "recorded.json"), trace=Path(folder, "run.h5"), options=options)
            with open_trace(Path(folder, "run.h5")) as trace:
                made = sum(step > 0 for step in trace.steps)
    except TraceError as error:
        return Report(name, {}, steps=steps, error=error.line())
    known = [part for part in PARTS if part in alone["digests"]]
    same = {part: alone["digests"][part] == recorded["digests"].get(part) for part in known}
    return Report(name, same, made, steps)


def _show(report: Report) -> Report:
    click.echo(report.line())
    sys.stdout.flush()
    return report
