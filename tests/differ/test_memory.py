"""What a comparison keeps does not grow with the number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from differ import Verdict, diff
from differ.align import LATEST, Rows
from differ.noise import _Twin
from differ.options import DiffOptions
from tests.builders import make_trace
from tracer.schema import Phase


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The rows and twins of the comparisons that follow."""
    seen: dict[str, Any] = {"rows": [], "twins": []}
    for kind, name in ((Rows, "rows"), (_Twin, "twins")):
        start = kind.__init__

        def remembering(self: Any, *words: Any, start: Any = start, name: str = name) -> None:
            start(self, *words)
            seen[name].append(self)

        monkeypatch.setattr(kind, "__init__", remembering)
    return seen


def test_derived_values_and_floors_of_a_long_run_are_let_go(
    tmp_path: Path, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("differ.align.REMEMBERED", 20)
    a, b = make_trace(tmp_path / "a.h5", steps=25), make_trace(tmp_path / "b.h5", steps=25, noise=3e-7)
    twin = make_trace(tmp_path / "twin.h5", steps=25, noise=3e-7, noise_seed=5)

    assert diff(a, b, DiffOptions(noise=(twin,))).verdict is Verdict.SAME

    assert kept["rows"]
    for rows in kept["rows"]:
        assert len(rows._memory) <= 20
        assert len(rows._latest) <= LATEST
    for one in kept["twins"]:
        assert 0 < len(one._floors) <= len(Phase)
