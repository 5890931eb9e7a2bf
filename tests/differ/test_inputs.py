"""How far apart the model's inputs are: only what the model computes with counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from differ import diff
from tests.builders import make_trace
from tracer.schema import RNG_PREFIX, Row


def other_generators(row: Row) -> Row:
    """A process whose random generators were never seeded."""
    records = tuple(
        replace(record, data=np.array([987, 654], np.int64)) if record.name.startswith(RNG_PREFIX) else record
        for record in row.records
    )
    return replace(row, records=records)


def test_the_state_of_a_random_generator_excuses_nothing(tmp_path: Path) -> None:
    a = make_trace(tmp_path / "a.h5")
    assert diff(a, make_trace(tmp_path / "same.h5", edit=other_generators)).verdict.exit_code == 0
    for phase in ("loss", "grad"):
        planted = {f"{phase}_factor": 1.2}
        first = diff(a, make_trace(tmp_path / f"{phase}.h5", edit=other_generators, **planted)).first
        assert first is not None, phase
        assert (first.step, first.phase) == (1, phase)


def test_parameters_that_differ_do_excuse_what_follows(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", fault="init_draw")
    assert {finding.phase for finding in diff(a, b).findings} == {"init"}
