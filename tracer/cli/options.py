"""Options that several commands share, so that a flag means one thing everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click
from click.shell_completion import CompletionItem

from tracer.asked import ALL, parse_steps
from tracer.recorder import FORWARD_ROWS
from tracer.schema import Phase
from tracer.size import parse_bytes
from tracer.thinning import LongRun

F = TypeVar("F", bound=Callable[..., Any])
# Bytes below which `--max-size` cannot be kept: the tables and indices of a small model take this much.
SMALLEST: Final = 10**6


class Steps(click.ParamType[Any]):
    """`3`, `1:5`, `:5` or `4:`: a range of steps, both ends included."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The first and the last step."""
        if isinstance(value, tuple):
            return value
        try:
            return parse_steps(str(value))
        except ValueError as error:
            self.fail(f"{value!r} {error}", param, ctx)


class Size(click.ParamType[Any]):
    """`2GB`, `500MB` or a number of bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        try:
            size = parse_bytes(str(value))
        except ValueError:
            self.fail(f"{value!r} is not a size (500MB, 2GB, 1048576)", param, ctx)
        if size < SMALLEST:
            self.fail(f"{value!r} is less than the tables of a trace take; give 1MB or more", param, ctx)
        return size


class Phases(click.ParamType[Any]):
    """`grad,param`: names of phases; `all` for every one."""

    name = "phases"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[Phase]:
        """The set of phases."""
        if isinstance(value, frozenset):
            return value
        if value == ALL:
            return frozenset(Phase)
        try:
            return frozenset(Phase.parse(label.strip()) for label in str(value).split(","))
        except KeyError as error:
            known = ", ".join(phase.label for phase in Phase)
            self.fail(f"{str(error.args[0]).lower()!r} is no phase; phases are {known}", param, ctx)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - the signature is click's
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """The phases that are not in the list yet."""
        before, comma, word = incomplete.rpartition(",")
        labels = [phase.label for phase in Phase if phase.label not in before.split(",")]
        return [CompletionItem(f"{before}{comma}{label}") for label in labels if label.startswith(word)]


def narrowing(command: F) -> F:
    """--steps, --only, --omit."""
    command = click.option(
        "--omit", multiple=True, metavar="GLOB", help="Leave out records whose canonical name matches."
    )(command)
    command = click.option(
        "--only", multiple=True, metavar="GLOB", help="Take only records whose canonical name matches."
    )(command)
    return click.option("--steps", type=Steps(), help="Take only these steps: 3, 1:5, :5, 4: (both ends included).")(
        command
    )


def inside_of_the_model(command: F) -> F:
    """--modules, --forward-rows, --micro-grads, --token-loss."""
    command = click.option("--token-loss", is_flag=True, help="Also record the loss of every token.")(command)
    command = click.option("--micro-grads", is_flag=True, help="Also record the gradient of every micro-batch.")(
        command
    )
    command = click.option(
        "--forward-rows",
        type=click.IntRange(1),
        default=FORWARD_ROWS,
        show_default=True,
        metavar="N",
        help="With phase forward: outputs at this many positions of a micro-batch.",
    )(command)
    return click.option(
        "--modules",
        multiple=True,
        metavar="GLOB",
        help="With phase forward: only modules whose canonical name matches.",
    )(command)


def long_runs(command: F) -> F:
    """--full-steps, --around, --spike, --max-size."""
    plain = LongRun()
    command = click.option(
        "--max-size",
        type=Size(),
        metavar="SIZE",
        help="The trace may have this size (2GB): steps are thinned when little is left, then recording stops.",
    )(command)
    command = click.option(
        "--spike",
        type=click.FloatRange(1.0, min_open=True),
        default=plain.spike,
        show_default=True,
        metavar="X",
        help="A loss above X times the median of the last 32 is an anomaly; so is nan or inf.",
    )(command)
    command = click.option(
        "--around",
        type=click.IntRange(0),
        default=plain.around,
        show_default=True,
        metavar="N",
        help="Thinned runs keep the tensors of N steps before and after an anomaly.",
    )(command)
    return click.option(
        "--full-steps",
        type=click.IntRange(0),
        metavar="N",
        help="Keep tensors for the first N steps, statistics and sketches after them.",
    )(command)
