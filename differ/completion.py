"""What the shell offers for the options of `trace diff`."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem

from tracer.schema import Phase


def complete_phases(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """The phases that are not in the list yet."""
    before, comma, word = incomplete.rpartition(",")
    labels = [phase.label for phase in Phase if phase.label not in before.split(",")]
    return [CompletionItem(f"{before}{comma}{label}") for label in labels if label.startswith(word)]
