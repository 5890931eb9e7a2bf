"""`grad.missing`, `grad.zero`: a parameter gets no gradient on one side, or one that is all zero.

    missing   state none, or no record            the graph does not reach the parameter (transformers #26221, #21381)
    zero      state zero against a value          it reaches it with a factor of zero, or the buffer was cleared

Undone: the absent gradient replaced by the other side's, so that the share is that of the named records: 1 unless a
record's absence is a matter of a few elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from differ.causes.context import Context
from differ.causes.fit import squared
from differ.causes.words import which
from differ.result import Cause, Finding, Kind
from tracer.schema import Phase, State

IDS: Final = ("grad.missing", "grad.zero")


def find(context: Context) -> list[Cause]:
    """At most one cause of each kind for a side and step."""
    causes = []
    for step, _, found in context.groups(Phase.GRAD):
        for side, other in (("a", "b"), ("b", "a")):
            missing = [finding.name for finding in found if finding.name and _is_missing(finding, side)]
            zero = [f.name for f in found if f.name and f.name not in missing and _is_zero(context, f, side, other)]
            if missing:
                causes.append(_cause("grad.missing", context, step, side, missing))
            if zero:
                causes.append(_cause("grad.zero", context, step, side, zero))
    return causes


def _is_missing(finding: Finding, side: str) -> bool:
    if finding.kind is Kind.STATE:
        return (finding.a if side == "a" else finding.b) == State.NONE.label
    return finding.kind is (Kind.MISSING_A if side == "a" else Kind.MISSING_B)


def _is_zero(context: Context, finding: Finding, side: str, other: str) -> bool:
    assert finding.name is not None
    states = [context.state(which, Phase.GRAD, finding.step, finding.name) for which in (side, other)]
    return states == [State.ZERO, State.VALUE]


def _cause(cause_id: str, context: Context, step: int, side: str, names: Sequence[str]) -> Cause:
    total = len(set(context.names("a", Phase.GRAD, step)) | set(context.names("b", Phase.GRAD, step)))
    what = "no gradient" if cause_id == "grad.missing" else "a zero gradient"
    summary = f"{side} has {what} for {which(names, total)}; {'b' if side == 'a' else 'a'} has one"
    other = "b" if side == "a" else "a"
    absent = [context.values(other, Phase.GRAD, step, name) for name in names]
    size = sum(squared(values) for values in absent if values is not None)
    parameters = {"count": len(names), "of": total, "norm": float(f"{size**0.5:.6g}")}
    return Cause(
        cause_id, summary, side=side, step=step, phase=Phase.GRAD.label, names=tuple(names), parameters=parameters, explains=1.0
    )  # fmt: skip
