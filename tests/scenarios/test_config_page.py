"""The documented settings are those in the code."""

from __future__ import annotations

from pathlib import Path

from scenarios.config_page import page


def test_the_page_is_what_the_code_says() -> None:
    path = Path(__file__).parents[2] / "docs" / "config.md"
    assert path.read_text() == page(), "run: python -m scenarios.config_page > docs/config.md"
