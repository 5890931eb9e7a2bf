"""Judge `clipped_grad` by replay: which clipping rule gives each side's clipped gradients from its own gradients.

Both sides under one rule: whatever differs was in the gradients already.  Different rules: one finding, at the tensor
that they change most.
"""

from __future__ import annotations

from collections.abc import Sequence

from differ.align import Row, Rows, Tensor
from differ.compare import Distance, distance, element
from differ.judges.across import judge_across, waived
from differ.judges.left_out import settle
from differ.policy import Policy
from differ.replay.clip import ClippedTensor, ClipRules, clipped_tensor, identify
from differ.result import Cause
from differ.session import RowPair, Session, value_finding
from tracer.schema import REPORTED_PREFIX, Phase


def judge_clip(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """Find each side's rule and compare the rules."""
    rules = [clip_rules(session.policy, rows, row) for rows, row in ((session.a, pair.a), (session.b, pair.b))]
    a, b = rules
    tolerance = session.policy.exact["rule_constant"]
    if a is None or b is None or not (a.known and b.known):
        _judge_unknown(session, pair, names, rules)
    elif a.agrees(b, tolerance):
        settle(session, pair, dict.fromkeys(names, max(a.margin, b.margin)))
    else:
        _find_rules(session, pair, names, a, b)


def clip_rules(policy: Policy, rows: Rows, row: Row) -> ClipRules | None:
    """Rules of one side at one step; None if its gradients were not recorded."""
    gradients = rows.get(Phase.GRAD, row.view.step)
    if gradients is None:
        return None
    tensors: list[ClippedTensor] = []
    for name in row.positions:
        if name.startswith(REPORTED_PREFIX) or not row.stored(name):
            continue
        if name not in gradients.positions or not gradients.stored(name) or gradients.shape(name) != row.shape(name):
            return None
        tensors.append(_measure(policy, gradients, row, name))
    return identify(tensors, policy.exact["rule_constant"])


def _measure(policy: Policy, gradients: Row, row: Row, name: str) -> ClippedTensor:
    dtype = row.entry(name).dtype
    tolerance = policy.replay(dtype)
    if gradients.digest(name) and gradients.digest(name) == row.digest(name) and gradients.entry(name).dtype == dtype:
        norm, low, high = (float(value) for value in row.view.stats[row.positions[name], :3])
        largest = max(abs(low), abs(high))
        return ClippedTensor(norm, largest, largest, 1.0, 0.0, 0.0, 0.0, tolerance.eps)
    return clipped_tensor(gradients.read(name), row.read(name), tolerance)


def _judge_unknown(session: Session, pair: RowPair, names: Sequence[str], rules: Sequence[ClipRules | None]) -> None:
    """A side without its gradients, or under no known rule: say so and compare across."""
    for side, found in zip("ab", rules, strict=True):
        if found is None:
            summary = f"{side} has no gradients to replay the clipping from"
        elif found.known:
            continue
        else:
            summary = found.sentence(side)
        session.note_once(Cause("rule.unknown", summary, side=side, step=pair.step, phase=pair.phase.label))
    for name in names:
        judge_across(session, pair, name)


def _find_rules(session: Session, pair: RowPair, names: Sequence[str], a: ClipRules, b: ClipRules) -> None:
    """One finding for two different rules, at the tensor with the largest difference; the others are its company."""
    names = [name for name in names if not waived(session, pair, name)]
    if not names:
        return
    if not session.first_time(pair.phase, "rule"):
        for name in names:
            session.tally.repeated(pair.phase, name)
        return
    name, measured = largest_difference(pair, names)
    for side, found in (("a", a), ("b", b)):
        kind, value = found.named
        parameters = {"rule": kind.value} if value is None else {"rule": kind.value, "value": value}
        session.note_once(
            Cause(
                "rule", found.sentence(side), side=side, step=pair.step, phase=pair.phase.label, parameters=parameters
            )
        )
    tensors = (pair.a.read(name), pair.b.read(name))
    tolerance = session.policy.replay(pair.dtype(name))
    allowed = tolerance.ulp * tolerance.eps
    required = _element_error(measured, tensors)
    session.measured(pair, name, required, allowed, diverged=True)
    session.tally.explained(pair.phase, len(names) - 1)
    session.tally.find(
        value_finding(
            pair, name, measured, tensors, observed=measured.rel_l2(), tolerance=allowed,
            required=required, detail=f"{a.sentence('a')}; {b.sentence('b')}",
        )
    )  # fmt: skip


def _element_error(measured: Distance, tensors: tuple[Tensor, Tensor]) -> float:
    """Relative error of the element that differs most: a rule is replayed element by element."""
    size = max(abs(float(element(tensor, measured.at))) for tensor in tensors)
    return max(measured.rel_l2(), measured.max_abs / size if size > 0.0 else 0.0)


def largest_difference(pair: RowPair, names: Sequence[str]) -> tuple[str, Distance]:
    """The record whose two sides are furthest apart in absolute L2, and its distance; ties go to the first name."""
    measured = {name: distance(pair.a.read(name), pair.b.read(name)) for name in sorted(names)}
    name = max(measured, key=lambda candidate: measured[candidate].diff)
    return name, measured[name]
