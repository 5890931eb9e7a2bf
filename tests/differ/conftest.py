from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from differ import DiffOptions, DiffResult, diff
from tests.builders import make_trace

NOISE = 3e-7

Compare = Callable[..., DiffResult]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Two synthetic runs, b with rounding noise of its own and the fault; `both` are settings of both, `a_*` of a alone."""

    def run(
        fault: str | None = None,
        *,
        options: DiffOptions | None = None,
        noise: float = NOISE,
        a: dict[str, Any] | None = None,
        b: dict[str, Any] | None = None,
        **both: Any,
    ) -> DiffResult:
        first = make_trace(tmp_path / "a.h5", **{**both, **(a or {})})
        second = make_trace(tmp_path / "b.h5", fault=fault, **{**both, "noise": noise, **(b or {})})
        return diff(first, second, options)

    return run
