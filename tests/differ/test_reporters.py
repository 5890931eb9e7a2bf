"""Reports: golden files for one diverged and one equal pair, and what every reporter must hold to.

Update them with `STEPTRACE_UPDATE_GOLDEN=1 python -m pytest tests/differ/test_reporters.py` and read the difference.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from differ import Cause, DiffResult, diff
from differ.reporters import REPORTERS, Style, reporter
from tests.builders import make_trace
from tests.differ.conftest import Compare

GOLDEN = Path(__file__).parents[1] / "golden" / "differ"

CAUSES = (
    Cause("init.names", "b adapts layers 1–2, a all 3", side="b", step=0, phase="init", names=("x",), explains=1.0),
    Cause("config.differs", "clip.mode: a none, b value", step=0, phase="config", names=("clip.mode",)),
)


def story(tmp_path: Path) -> DiffResult:
    """Layers left out, a value clip that nobody asked for and no bias correction, in one pair."""
    a = make_trace(tmp_path / "a.h5", declared={"path": "mlx-lm", "clip.mode": "none"})
    b = make_trace(
        tmp_path / "b.h5",
        fault="init_names",
        declared={"path": "hf-trainer", "clip.mode": "value"},
        clip="value",
        clip_value=0.01,
        bias_correction=False,
    )
    result = diff(a, b)
    # Where the files lie is no part of a golden file, and what the causes say is tested with the causes.
    return replace(
        result,
        a=replace(result.a, path="a.h5"),
        b=replace(result.b, path="b.h5"),
        causes=CAUSES,
        notes=tuple(note for note in result.notes if note.id == "rule"),
    )


def check(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("STEPTRACE_UPDATE_GOLDEN"):
        GOLDEN.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_the_text_of_a_divergence_is_golden(tmp_path: Path) -> None:
    check("diverged.txt", reporter("text")(story(tmp_path), Style(width=80)))


def test_the_json_of_a_divergence_is_golden(tmp_path: Path) -> None:
    text = reporter("json")(story(tmp_path), Style())
    check("diverged.json", re.sub(r'"version": "[^"]*"|"tool": "[^"]*"', '"version": "X"', text))


def test_the_text_of_equal_traces_is_golden(tmp_path: Path) -> None:
    check(
        "same.txt",
        reporter("text")(diff(make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5")), Style(width=80)),
    )


@pytest.mark.parametrize(
    "fault", [None, "init_cast", "init_names", "grad_row", "unfinished", "grad_nan", "micro_batches"]
)
@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_text_report_is_short_and_fits(fault: str | None, width: int, compare: Compare) -> None:
    lines = reporter("text")(compare(fault), Style(width=width)).splitlines()

    assert len(lines) <= 25 or width < 80
    for line in lines:
        # Only a name, which is never broken, may stand out.
        assert (
            len(line) <= width
            or " " not in line.strip().removeprefix("DIVERGED at ")
            or len(line.split()[-1]) > width - 20
        )
    assert not any("\x1b" in line for line in lines)


def test_colour_is_the_verdict_s_only(compare: Compare) -> None:
    text = reporter("text")(compare("lr"), Style(width=100, colour=True))

    assert "\x1b[" in text.splitlines()[0]
    assert not any("\x1b[" in line for line in text.splitlines()[1:])


def test_the_json_has_the_documented_keys(compare: Compare) -> None:
    document = json.loads(reporter("json")(compare("grad_element"), Style()))

    assert document["format"] == 1
    documented = {
        "format",
        "tool",
        "a",
        "b",
        "policy",
        "verdict",
        "first",
        "causes",
        "notes",
        "counts",
        "margin",
        "findings",
    }
    assert documented <= set(document)
    finding = {"step", "micro_batch", "phase", "name", "kind", "rel_l2", "max_abs", "max_ulp", "index", "a", "b"}
    assert finding | {"tolerance", "required"} <= set(document["first"])
    assert set(document["counts"]) == {
        "steps", "compared", "same_bits", "within", "propagated", "diverged", "unrecorded"
    }  # fmt: skip
    assert document["findings"][0] == document["first"]


def test_numbers_that_are_not_finite_are_strings_in_json(compare: Compare) -> None:
    assert json.loads(compare("grad_nan").to_json())["first"]["b"] == "nan"
    assert json.loads(compare("grad_inf").to_json())["first"]["b"] == "inf"
    result = replace(compare(None), margin=-math.inf)
    assert json.loads(result.to_json())["margin"] == "-inf"


def test_every_reporter_renders_every_verdict(compare: Compare) -> None:
    results = [
        compare(None),
        compare("lr"),
        replace(compare(None), verdict=type(compare(None).verdict)("incomparable")),
    ]
    for name in REPORTERS:
        assert all(reporter(name)(result, Style()).endswith("\n") for result in results)
