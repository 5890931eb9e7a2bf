"""Options that several commands share, so that a flag means one thing everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from tracer.schema import Phase

F = TypeVar("F", bound=Callable[..., Any])


class Steps(click.ParamType[Any]):
    """`3`, `1:5`, `:5` or `4:`: a range of steps, both ends included."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The first and the last step."""
        if isinstance(value, tuple):
            return value
        first, colon, last = str(value).partition(":")
        try:
            low = int(first) if first else 0
            high = (int(last) if last else 2**62) if colon else low
        except ValueError:
            self.fail(f"{value!r} is not a step (3) or a range of steps (1:5)", param, ctx)
        if low > high or low < 0:
            self.fail(f"{value!r} holds no step", param, ctx)
        return low, high


class Phases(click.ParamType[Any]):
    """`grad,param`: names of phases."""

    name = "phases"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[Phase]:
        """The set of phases."""
        if isinstance(value, frozenset):
            return value
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
