from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from differ import DiffOptions, DiffResult, diff
from differ.result import Cause
from differ.series import Series
from tests.builders import make_trace

# A name that tries to be markup in every language that a report is written in.
HOSTILE = (
    "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>`|[x](y)\n"
    "::error::{{7*7}}]]>&amp;\x1b[31m\x00\u202e%0A,"
)

Drawn = Callable[..., DiffResult]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Two synthetic runs compared for a report that draws; each fault is made once."""
    known: dict[tuple[object, ...], DiffResult] = {}

    def run(fault: str | None = None, **settings: object) -> DiffResult:
        key = (fault, *sorted(settings.items()))
        if key not in known:
            folder: Path = tmp_path_factory.mktemp("drawn")
            a = make_trace(folder / "a.h5", **settings)
            b = make_trace(folder / "b.h5", fault=fault, **{"noise": 3e-7, **settings})
            known[key] = diff(a, b, DiffOptions(series=True))
        return known[key]

    return run


def hostile(result: DiffResult) -> DiffResult:
    """The same result with HOSTILE wherever a file could have put text."""
    assert result.first is not None
    assert result.series is not None
    findings = tuple(replace(f, name=HOSTILE, detail=HOSTILE, nearest=(HOSTILE,)) for f in result.findings)
    causes = (Cause("clip.value", HOSTILE, phase=result.first.phase, explains=0.999), Cause("config.differs", HOSTILE))
    return replace(
        result, a=replace(result.a, label=HOSTILE, path=HOSTILE, tool=HOSTILE), first=findings[0], findings=findings,
        causes=causes, series=_hostile_series(result.series),
    )  # fmt: skip


def _hostile_series(series: Series) -> Series:
    layers = tuple(replace(strip, rows=(HOSTILE, *strip.rows[1:])) for strip in series.layers)
    return replace(series, layers=layers, records=tuple(replace(record, name=HOSTILE) for record in series.records))


def with_findings(result: DiffResult, number: int) -> DiffResult:
    """The same result with that many findings."""
    assert result.first is not None
    findings = tuple(
        replace(result.first, step=1 + i // 40, name=f"model.layers.{i % 40}.mlp.up_proj.lora_B.weight", rel_l2=i / 7)
        for i in range(number)
    )
    return replace(result, first=findings[0], findings=findings)
