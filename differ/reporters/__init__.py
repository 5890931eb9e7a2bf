"""Reporters: each renders a `DiffResult` and computes nothing; registered by name, loaded when asked for.

A reporter is a module with `render(result, style) -> str`.
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

REPORTERS: Final[Mapping[str, str]] = {"text": "differ.reporters.text", "json": "differ.reporters.json"}


def reporter(name: str) -> Render:
    """The reporter of that name; raises KeyError."""
    render: Render = importlib.import_module(REPORTERS[name]).render
    return render
