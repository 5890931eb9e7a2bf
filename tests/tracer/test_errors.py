"""Every error that a user can meet is documented under its slug."""

from __future__ import annotations

import re
from pathlib import Path

from tracer import errors
from tracer.errors import Damaged, TraceError

PAGE = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()


def test_every_slug_has_a_heading_and_every_heading_a_slug() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, TraceError)]
    slugs = {kind.slug for kind in classes if kind is not TraceError} | {"internal"}
    assert set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE)) == slugs


def test_every_error_is_exit_code_2() -> None:
    assert {kind.exit_code for kind in TraceError.__subclasses__()} == {2}


def test_an_error_is_one_line_whatever_it_is_made_of() -> None:
    assert Damaged("a\nb", "c\n  d").line() == "a b; c d [damaged]"
