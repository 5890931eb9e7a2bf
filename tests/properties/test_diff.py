"""The algebra of a comparison: what holds for any two traces, whatever is planted in them."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from differ import DiffOptions, DiffResult, Verdict, diff
from differ.policy import default_policy
from differ.result import Kind
from tests.builders import FAULTS, make_trace
from tracer.schema import Phase

FOLDER = Path(tempfile.mkdtemp(prefix="properties-"))
# Traces are made once each and compared many times.
EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

faults = st.sampled_from([None, *sorted(FAULTS)])
noises = st.sampled_from([0.0, 3e-7])
MIRROR = {Kind.MISSING_A: Kind.MISSING_B, Kind.MISSING_B: Kind.MISSING_A}


@functools.cache
def trace(fault: str | None, noise: float, reverse: bool = False) -> Path:
    return make_trace(FOLDER / f"{fault}-{noise}-{reverse}.h5", fault=fault, noise=noise, reverse=reverse)


@functools.cache
def compared(fault_a: str | None, fault_b: str | None, noise: float) -> DiffResult:
    return diff(trace(fault_a, 0.0), trace(fault_b, noise))


def addresses(result: DiffResult) -> set[tuple[object, ...]]:
    return {(f.step, f.phase, f.micro_batch, f.name, f.kind) for f in result.findings}


@EXAMPLES
@given(fault=faults, noise=noises)
def test_a_trace_is_the_same_as_itself(fault: str | None, noise: float) -> None:
    result = diff(trace(fault, noise), trace(fault, noise))

    assert result.verdict is Verdict.SAME
    assert result.findings == ()
    assert result.margin == 0.0
    assert result.counts.compared == result.counts.same_bits > 0


@EXAMPLES
@given(a=faults, b=faults, noise=noises)
def test_findings_mirror_when_the_sides_change_places(a: str | None, b: str | None, noise: float) -> None:
    there, back = diff(trace(a, 0.0), trace(b, noise)), diff(trace(b, noise), trace(a, 0.0))

    mirrored = {(s, p, m, n, MIRROR.get(k, k)) for s, p, m, n, k in addresses(there)}  # type: ignore[call-overload]
    assert mirrored == addresses(back)
    assert there.counts == back.counts
    assert there.verdict is back.verdict
    assert [f.rel_l2 for f in there.findings] == [f.rel_l2 for f in back.findings]


@EXAMPLES
@given(a=faults, b=faults, noise=noises, factor=st.sampled_from([2.0, 30.0, 1e3, 1e6]))
def test_a_wider_tolerance_never_turns_same_into_diverged_nor_comes_earlier(
    a: str | None, b: str | None, noise: float, factor: float
) -> None:
    policy = default_policy()
    tables = {key: replace(tolerance, base=tolerance.base * factor) for key, tolerance in policy.tables.items()}
    wide = diff(trace(a, 0.0), trace(b, noise), DiffOptions(policy=replace(policy, tables=tables)))
    narrow = compared(a, b, noise)

    assert not (narrow.verdict is Verdict.SAME and wide.verdict is Verdict.DIVERGED)
    if wide.first is not None:
        assert narrow.first is not None
        order = [(f.step, Phase.parse(f.phase)) for f in (narrow.first, wide.first)]
        assert order[0] <= order[1]


@EXAMPLES
@given(
    b=faults, noise=noises, factor=st.sampled_from([2.0, 1e3]), phase=st.sampled_from(["loss", "grad", "param", "init"])
)
def test_a_wider_tolerance_in_a_phase_never_adds_a_finding_to_it(
    b: str | None, noise: float, factor: float, phase: str
) -> None:
    policy = default_policy()
    tables = {
        key: replace(tolerance, base=tolerance.base * factor) if key[0] == phase else tolerance
        for key, tolerance in policy.tables.items()
    }
    wide = diff(trace(None, 0.0), trace(b, noise), DiffOptions(policy=replace(policy, tables=tables)))

    def in_phase(result: DiffResult) -> set[tuple[object, ...]]:
        return {address for address in addresses(result) if address[1] == phase}

    # A divergence may be found at a later step than before, never under another name.
    assert {a[3] for a in in_phase(wide)} <= {a[3] for a in in_phase(compared(None, b, noise))}


@EXAMPLES
@given(fault=faults, noise=noises)
def test_the_order_of_names_does_not_matter(fault: str | None, noise: float) -> None:
    straight = compared(None, fault, noise)
    reverse = diff(trace(None, 0.0, True), trace(fault, noise))

    assert addresses(reverse) == addresses(straight)
    assert reverse.verdict is straight.verdict
    assert reverse.first == straight.first


@EXAMPLES
@given(a=faults, b=faults, noise=noises)
def test_first_is_first_and_every_record_is_counted_once(a: str | None, b: str | None, noise: float) -> None:
    result = compared(a, b, noise)

    order = [(f.step, Phase.parse(f.phase), -1 if f.micro_batch is None else f.micro_batch) for f in result.findings]
    assert order == sorted(order)
    assert result.first == (result.findings[0] if result.findings else None)
    counts = result.counts
    assert counts.diverged == len(result.findings)
    on_both = [f for f in result.findings if f.kind not in (Kind.MISSING_A, Kind.MISSING_B)]
    assert counts.compared == counts.same_bits + counts.within + len(on_both)
    assert (result.verdict is Verdict.DIVERGED) == bool(result.findings)
    assert all(f.required is None or f.tolerance is None or f.required > f.tolerance for f in result.findings)
