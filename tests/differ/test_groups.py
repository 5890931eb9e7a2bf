"""Two optimizers with the same groups that hold other parameters: found where the settings are, not in the updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from differ import DiffResult, Verdict, diff
from differ.result import Kind
from tests.builders import F32, make_trace, record
from tests.differ.causes.plant import A, B
from tracer.reader import open_trace
from tracer.schema import Phase, Row
from tracer.shrink import shrink
from tracer.writer import TraceWriter

NORM, PROJECTION = "layers.0.norm.weight", "layers.0.proj.weight"
SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def write(path: Path, *, plain: list[str], decay: float = 0.1) -> Path:
    """A trace of two groups; those of `plain` do not decay."""
    hparams = [
        record(f"group{i}.{key}", np.float64(value))
        for i, group in enumerate(({**SETTINGS, "weight_decay": decay}, {**SETTINGS, "weight_decay": 0.0}))
        for key, value in group.items()
    ]
    weights = [record(name, np.ones((4,), F32)) for name in (NORM, PROJECTION)]
    groups = {"group0": [n for n in (NORM, PROJECTION) if n not in plain], "group1": plain}
    writer = TraceWriter(path, env={}, declared={}, overwrite=True)
    writer.write_step(0, [Row(Phase.INIT, 0, -1, tuple(weights))], {"framework": "numpy", "optimizer.groups": groups})
    writer.write_step(1, [Row(Phase.HPARAMS, 1, -1, tuple(hparams))])
    writer.finish()
    return path


def compared(folder: Path, a: list[str], b: list[str], *, decay: float = 0.1) -> DiffResult:
    return diff(write(folder / "a.h5", plain=a, decay=decay), write(folder / "b.h5", plain=b, decay=decay))


def test_a_parameter_in_another_group_is_found_in_the_settings_with_its_cause(tmp_path: Path) -> None:
    result = compared(tmp_path, [NORM], [NORM, PROJECTION])

    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.name) == (1, "hparams", PROJECTION)
    assert (result.first.kind, result.first.a, result.first.b) == (Kind.STATE, "weight_decay 0.1", "weight_decay 0")
    cause = result.causes[0]
    assert (cause.id, cause.names) == ("optimizer.weight_decay", (PROJECTION,))
    assert cause.parameters == {"setting": "weight_decay", "a": 0.1, "b": 0.0}
    assert cause.summary == f"weight decay of {PROJECTION}: a 0.1, b 0"


def test_the_same_groups_and_groups_that_differ_in_nothing_are_the_same(tmp_path: Path) -> None:
    assert compared(tmp_path, [NORM], [NORM]).verdict is Verdict.SAME
    assert compared(tmp_path, [NORM], [PROJECTION], decay=0.0).verdict is Verdict.SAME


@pytest.mark.parametrize("fault", ["param_stuck", "moment"])
def test_groups_that_are_only_listed_otherwise_explain_nothing(fault: str, tmp_path: Path) -> None:
    files = []
    for name, names in (("a", [*A, *B]), ("b", [*B, *A])):
        given = {"optimizer.groups": {"group0": names}}
        whole = make_trace(tmp_path / f"{name}.h5", fault=fault if name == "b" else None, observed=given)
        files.append(tmp_path / f"{name}.small.h5")
        with open_trace(whole) as trace:
            shrink(trace, files[-1])

    result = diff(*files)

    assert result.first is not None
    assert result.first.phase in ("param", "opt_state")
