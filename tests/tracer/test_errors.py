"""Every error that a user can meet is documented under its slug."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from tracer.errors import Damaged, TraceError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text()
SOURCES = [path for package in ("tracer", "differ", "scenarios") for path in (ROOT / package).rglob("*.py")]


def test_every_slug_has_a_heading_and_every_heading_a_slug() -> None:
    slugs = {
        slug for path in SOURCES for slug in re.findall(r'^    slug = "([a-z-]+)"$', path.read_text(), re.MULTILINE)
    }
    assert "damaged" in slugs
    assert set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE)) == slugs | {"internal"}


def test_every_error_is_exit_code_2() -> None:
    assert {kind.exit_code for kind in TraceError.__subclasses__()} == {2}


def test_an_error_is_one_line_whatever_it_is_made_of() -> None:
    assert Damaged("a\nb", "c\n  d").line() == "a b; c d [damaged]"


def test_a_traceback_of_an_error_says_what_to_do() -> None:
    assert traceback.format_exception(Damaged("a.h5 is damaged", "copy it again"))[-1] == "copy it again\n"
    assert not hasattr(Damaged("a.h5 is damaged"), "__notes__")
