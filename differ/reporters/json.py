"""The result as JSON, format 1: the object of `DiffResult.to_dict`, keys sorted."""

from __future__ import annotations

from differ.reporters import Style
from differ.result import DiffResult


def render(result: DiffResult, style: Style) -> str:  # noqa: ARG001 - the JSON has one form
    """JSON text."""
    return result.to_json()
