"""The report for a terminal at its edges: narrow and wide windows, long names, many lines, colour, hostile names."""

from __future__ import annotations

from dataclasses import replace

import pytest

from differ import DiffResult
from differ.reporters import Style, text
from differ.result import Cause
from tests.differ.reporters.conftest import Drawn, hostile, with_findings


def lines(result: DiffResult, width: int = 80, colour: bool = False) -> list[str]:
    return text.render(result, Style(width=width, colour=colour)).splitlines()


def test_only_the_verdict_is_coloured(drawn: Drawn) -> None:
    first, *rest = lines(drawn("clip_value"), colour=True)
    assert first.startswith("\x1b[1;31mDIVERGED\x1b[0m at step 1")
    assert not any("\x1b" in line for line in rest)


@pytest.mark.parametrize("fault", [None, "clip_value", "init_names", "micro_batches", "grad_nan"])
def test_a_wide_window_is_not_filled(fault: str | None, drawn: Drawn) -> None:
    assert max(map(len, lines(drawn(fault), width=400))) <= text.WIDEST
    assert len(lines(drawn(fault), width=400)) < len(lines(drawn(fault), width=60))


def test_a_name_longer_than_the_line_is_whole_and_alone(drawn: Drawn) -> None:
    result = drawn("grad_element")
    assert result.first is not None
    name = "model." + ".".join(f"block_{i}" for i in range(30))
    first = replace(result.first, name=name)

    found = lines(replace(result, first=first, findings=(first,)))

    assert found[0] == "DIVERGED at step 2, grad,"
    assert found[1] == f"  {name}"
    assert all(len(line) <= 80 for line in found if name not in line)


@pytest.mark.parametrize("width", range(50, 121, 7))
def test_a_number_its_word_and_an_index_stay_together(width: int, drawn: Drawn) -> None:
    for line in lines(drawn("clip_value"), width):
        assert line.count("[") == line.count("]")
        assert not line.endswith((" a", " b", " 1", "tolerance 4.77e-07;"))
        assert not line.strip().startswith(("diverged", "propagated", "steps"))


def test_many_of_a_kind_are_counted(drawn: Drawn) -> None:
    result = replace(
        with_findings(drawn("grad_element"), 3_210),
        causes=(*(Cause("x", f"cause {i}") for i in range(20)), *(Cause("config.differs", f"s{i}: a 1, b 2") for i in range(9))),
        notes=tuple(Cause("n", f"note {i}") for i in range(9)),
    )  # fmt: skip
    found = lines(result, 120)

    assert "  cause    … 12 more causes" in found
    assert "  config   … 5 more settings" in found
    assert "  note     … 5 more notes" in found
    assert "  also     … 76 more findings" in found
    assert len(found) < 35


def test_hostile_names_move_no_cursor(drawn: Drawn) -> None:
    for line in lines(hostile(drawn("clip_value")), 120):
        assert line.isprintable()
