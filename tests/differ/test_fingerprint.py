"""Fingerprints: what a comparison with sketches still sees, where, and what it says that it cannot see."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from differ import DiffOptions, DiffResult, Verdict, diff
from differ.fingerprint import SLACK
from tests.builders import FAULTS, make_trace
from tracer.names import Rule
from tracer.reader import open_trace
from tracer.shrink import shrink
from tracer.sketch import FLOOR

NOISE = 3e-7

# Faults that tensors show and sketches do not: less than the tolerance across two sides, in an update or one element.
UNSEEN = {"no_decay", "eps_inside", "eps_before"}


def shrunk(path: Path) -> Path:
    output = path.with_suffix(".fp.h5")
    with open_trace(path) as trace:
        shrink(trace, output, overwrite=True)
    return output


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trace(tmp_path_factory.mktemp("clean") / "a.h5")


@pytest.fixture(scope="module")
def golden(clean: Path) -> Path:
    return shrunk(clean)


def address(result: DiffResult) -> tuple[object, ...]:
    first = result.first
    return (result.verdict,) if first is None else (result.verdict, first.step, first.phase, first.kind)


def test_a_run_and_its_own_fingerprint_are_the_same_bits(clean: Path, golden: Path) -> None:
    for a, b in ((golden, clean), (clean, golden), (golden, golden)):
        result = diff(a, b)
        assert result.verdict is Verdict.SAME
        assert result.counts.within == result.counts.propagated == 0
        assert result.counts.same_bits == result.counts.compared > 100
        assert result.margin == 0.0


@pytest.mark.parametrize("noise", [1e-7, NOISE])
def test_a_twin_that_rounds_otherwise_is_the_same(golden: Path, tmp_path: Path, noise: float) -> None:
    result = diff(golden, make_trace(tmp_path / "b.h5", noise=noise, noise_seed=3))
    assert result.verdict is Verdict.SAME, result.first
    assert result.counts.within > 50


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - UNSEEN))
def test_a_planted_fault_is_found_where_the_full_comparison_finds_it(
    clean: Path, golden: Path, tmp_path: Path, fault: str
) -> None:
    other = make_trace(tmp_path / "b.h5", fault=fault)
    full = address(diff(clean, other))
    assert address(diff(golden, other)) == full
    assert address(diff(golden, shrunk(other))) == full


@pytest.mark.parametrize("fault", sorted(UNSEEN))
def test_what_only_a_replay_shows_is_missed_and_the_notes_say_so(
    clean: Path, golden: Path, tmp_path: Path, fault: str
) -> None:
    other = make_trace(tmp_path / "b.h5", fault=fault)
    assert diff(clean, other).verdict is Verdict.DIVERGED
    result = diff(golden, other)
    assert result.verdict is Verdict.SAME
    notes = {note.id: note for note in result.notes}
    assert "no clip or optimizer rule can be replayed" in notes["fingerprint.causes"].summary
    assert notes["fingerprint.sizes"].side == "a"


def test_swapping_the_sides_mirrors_the_answer(golden: Path, tmp_path: Path) -> None:
    other = make_trace(tmp_path / "b.h5", fault="grad_factor")
    one, two = diff(golden, other), diff(other, golden)
    assert address(one) == address(two)
    assert one.first is not None
    assert two.first is not None
    assert one.first.rel_l2 == two.first.rel_l2
    assert {note.side for note in two.notes if note.id == "fingerprint.sizes"} == {"b"}


def test_a_finding_has_the_estimate_and_its_tolerance(golden: Path, tmp_path: Path) -> None:
    first = diff(golden, make_trace(tmp_path / "b.h5", fault="grad_factor")).first
    assert first is not None
    assert first.rel_l2 == pytest.approx(1e-3, rel=0.3)
    assert first.required == first.rel_l2
    assert first.tolerance is not None
    assert FLOOR <= first.tolerance < 1e-3
    assert "estimated from sketches" in first.detail
    assert first.index is None


def test_the_tolerance_is_one_and_a_half_times_that_of_tensors(golden: Path, clean: Path, tmp_path: Path) -> None:
    other = make_trace(tmp_path / "b.h5", noise=NOISE, noise_seed=3)
    allowed: list[dict[tuple[object, ...], float]] = []
    for baseline in (clean, golden):
        found: dict[tuple[object, ...], float] = {}
        options = DiffOptions(probe=lambda m, found=found: found.update({(m.step, m.phase, m.name): m.tolerance}))  # type: ignore[misc]
        diff(baseline, other, options)
        allowed.append(found)
    key = next(key for key in allowed[0] if key[0] == 1 and getattr(key[1], "label", "") == "grad")
    assert allowed[1][key] == pytest.approx(SLACK * allowed[0][key])


def test_a_finding_stays_one_when_it_goes_on_at_later_steps(golden: Path, tmp_path: Path) -> None:
    result = diff(golden, make_trace(tmp_path / "b.h5", fault="grad_element", steps=3))
    assert [finding.step for finding in result.findings] == [2]


def test_a_wider_run_with_only_larger_batches_is_judged_by_digest(tmp_path: Path) -> None:
    a = make_trace(tmp_path / "a.h5", rows=200, micro_batches=1)
    golden = shrunk(a)
    with open_trace(golden) as trace:
        row = next(trace.rows(trace.phases[2]))
        assert row.phase.label == "batch"
        assert row.sketched(row.layout.positions["input_ids"])
    assert diff(golden, a).verdict is Verdict.SAME
    first = diff(golden, make_trace(tmp_path / "b.h5", rows=200, micro_batches=1, seed=7)).first
    assert first is not None
    assert (first.phase, first.name, first.tolerance) == ("batch", "input_ids", 0.0)


def test_a_parameter_that_only_the_fingerprint_trains_is_a_finding(tmp_path: Path) -> None:
    from dataclasses import replace

    from tracer.schema import Phase, Record, Row

    def is_it(record: Record) -> bool:
        return "layers.1" in record.name and "lora_A" in record.name

    def freeze(row: Row) -> Row:
        if row.phase is not Phase.INIT:
            return row
        changed = (
            replace(record, data=record.data * 2, stored=False)
            if "layers.1" in record.name and "lora_A" in record.name
            else record
            for record in row.records
        )
        return replace(row, records=tuple(changed))

    golden = shrunk(make_trace(tmp_path / "a.h5"))
    first = diff(golden, make_trace(tmp_path / "b.h5", edit=freeze)).first
    assert first is not None
    assert (first.kind, first.a, first.b) == ("state", "trainable", "frozen")


def test_a_rule_that_transposes_leaves_a_sketch_out_and_says_so(golden: Path, clean: Path) -> None:
    rules = (Rule(re.compile(r"lora_A\.weight"), "lora_A.weight", transpose=True),)
    result = diff(golden, clean, DiffOptions(rules=rules))
    assert any(note.id == "fingerprint.layout" for note in result.notes)
    assert result.counts.unrecorded > 0


def test_other_values_at_equal_norm_are_seen(tmp_path: Path, golden: Path) -> None:
    """A norm is blind to a sign flip, a permutation and a transposition; a sketch is not."""

    def flip(step: int, grads: dict[str, np.ndarray]) -> None:
        name = next(name for name in grads if "layers.1" in name and "lora_B" in name)
        if step == 2:
            grads[name][0] *= -1

    def permute(step: int, grads: dict[str, np.ndarray]) -> None:
        name = next(name for name in grads if "layers.1" in name and "lora_B" in name)
        if step == 2:
            grads[name][:] = grads[name][::-1].copy()

    for tamper in (flip, permute):
        result = diff(golden, make_trace(tmp_path / "b.h5", tamper=tamper))
        assert result.first is not None
        assert (result.first.step, result.first.phase) == (2, "grad")
        assert "layers.1" in str(result.first.name)
