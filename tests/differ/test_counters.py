"""Update counters: one for all parameters on one side and one each on the other are the same as far as they are equal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from differ import Verdict, diff
from tests.builders import make_trace, record
from tracer.names import split_state_name
from tracer.schema import Phase, Row

RESTARTED = "model.layers.1.self_attn.q_proj.lora_B.weight"


def one_each(restarted: str, at: int) -> Callable[[Row], Row]:
    """From step `at` on each parameter has a counter of its own, and that of `restarted` began again there."""

    def edit(row: Row) -> Row:
        if row.phase is not Phase.OPT_STATE or row.step < at:
            return row
        kept = [each for each in row.records if each.name != "step"]
        parameters = dict.fromkeys(split_state_name(each.name)[0] for each in kept)
        counts = {name: row.step - at + 1 if name == restarted else row.step for name in parameters}
        return replace(
            row, records=(*kept, *(record(f"{name}/step", np.asarray(np.int64(n))) for name, n in counts.items()))
        )

    return edit


def test_equal_counters_of_each_parameter_are_that_of_all(tmp_path: Path) -> None:
    a = make_trace(tmp_path / "a.h5")
    b = make_trace(tmp_path / "b.h5", edit=one_each("", 2))
    for pair in ((a, b), (b, a)):
        assert diff(*pair).verdict is Verdict.SAME


@pytest.mark.parametrize("swap", [False, True])
def test_the_one_parameter_whose_counter_began_again_is_named(tmp_path: Path, swap: bool) -> None:
    a = make_trace(tmp_path / "a.h5")
    b = make_trace(tmp_path / "b.h5", edit=one_each(RESTARTED, 2))
    result = diff(b, a) if swap else diff(a, b)
    assert result.verdict is Verdict.DIVERGED
    assert [(found.step, found.name) for found in result.findings] == [(2, f"{RESTARTED}/step")]
