"""Reporters: each renders a `DiffResult` and computes nothing; registered by name, loaded when asked for.

A reporter is a module with `render(result, style) -> str` and, if it draws `DiffResult.series`, `SERIES = True`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from differ.result import DiffResult


@dataclass(frozen=True, slots=True)
class Style:
    """How a report may look: columns to fill, and whether colour is wanted."""

    width: int = 100
    colour: bool = False


Render = Callable[[DiffResult, Style], str]

REPORTERS: Final[Mapping[str, str]] = {
    "text": "differ.reporters.text",
    "json": "differ.reporters.json",
    "markdown": "differ.reporters.markdown",
    "junit": "differ.reporters.junit",
    "github": "differ.reporters.github",
    "html": "differ.reporters.html",
}
# What `--format` prints, and what `--report` writes to a file.
FORMATS: Final = ("text", "json", "markdown", "junit", "github")
FILES: Final = ("html", "markdown", "junit", "json", "text")


def reporter(name: str) -> Render:
    """The reporter of that name; raises KeyError, or BadUsage if it needs a package that is not installed."""
    render: Render = importlib.import_module(REPORTERS[name]).render
    return render


def draws_series(name: str) -> bool:
    """Whether the reporter of that name needs `DiffOptions.series`."""
    return bool(getattr(importlib.import_module(REPORTERS[name]), "SERIES", False))
