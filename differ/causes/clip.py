"""`clip.value`, `clip.norm`, `clip.tensor`, `clip.none`: the two sides clip their gradients by different rules.

    value v    c = min(max(g, -v), v)          element by element    torch.nn.utils.clip_grad_value_, optax.clip
    norm n     c = g min(1, n / (|G| + 1e-6))  G: all gradients      torch.nn.utils.clip_grad_norm_, mlx.optimizers
    tensor n   the same with each tensor's own norm                  a norm per parameter
    shard n    the same with the norm of each of k disjoint sets     one process clipping what it holds, torchtune #2420

The rules are those that the judge identifies in the numbers.  Undone: each side's clipped gradients against the *other*
side's rule applied to its own gradients is the difference, against its own rule the residual.  The odd side is the one that
does not do what it declares; where that does not tell, the one that clips.  A factor on all gradients that no
clip gives is `grad.scale`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from differ.align import Row
from differ.causes.constants import name_factor, setting
from differ.causes.context import Context, Float64
from differ.causes.fit import Sums, squared
from differ.judges.clip import clip_rules
from differ.replay.clip import NORM_EPS, Clip, ClipRules, tidy, words
from differ.result import Cause
from tracer.dtypes import EPSILON
from tracer.reader import Trace
from tracer.schema import REPORTED_PREFIX, Phase

IDS: Final = ("clip.value", "clip.tensor", "clip.norm", "clip.none")

# Which of two kinds a cause is named for, where both sides clip and neither is odd.
_SPECIFIC: Final = (Clip.VALUE, Clip.TENSOR, Clip.NORM, Clip.SCALE, Clip.NONE)
# A tensor is concerned where the other rule misses it by more than this many units in the last place.
_CONCERNED: Final = 8.0
_SAME_FACTOR: Final = 1e-4
# Two constants whose ratio is the root of this many or fewer processes are said to be.
_MOST_SHARDS: Final = 1024


@dataclass(frozen=True, slots=True)
class _Rule:
    """One side's rule with its fitted constant, and the norm of its gradients."""

    kind: Clip
    value: float
    norm: float

    def apply(self, gradient: Float64) -> Float64:
        """The clipped gradient that the rule gives."""
        if self.kind is Clip.VALUE:
            return np.clip(gradient, -self.value, self.value)
        if self.kind is Clip.NONE:
            return gradient
        if self.kind is Clip.SCALE:
            return gradient * self.value
        norm = math.sqrt(squared(gradient)) if self.kind is Clip.TENSOR else self.norm
        return gradient * min(1.0, self.value / (norm + NORM_EPS))

    @property
    def parameters(self) -> dict[str, Any]:
        """The rule as it is printed in a report's parameters."""
        return {"rule": self.kind.value} | ({} if self.kind is Clip.NONE else {"value": tidy(self.value)})

    @property
    def sentence(self) -> str:
        """The rule in words, without the side."""
        return words(self.kind, tidy(self.value))


def find(context: Context) -> list[Cause]:
    """At most one cause for each step with a finding in `clipped_grad`."""
    causes = []
    for step, _, _ in context.groups(Phase.CLIPPED_GRAD):
        a, b = context.row("a", Phase.CLIPPED_GRAD, step), context.row("b", Phase.CLIPPED_GRAD, step)
        if a is None or b is None:
            continue
        rules = {side: clip_rules(context.policy, context.rows(side), row) for side, row in (("a", a), ("b", b))}
        found = _rules_cause(context, step, rules) or _shards_cause(context, step, rules)
        causes += [found] if found is not None else []
    return causes


def _rules_cause(context: Context, step: int, rules: dict[str, ClipRules | None]) -> Cause | None:
    known = {side: _rule(context, step, side, found) for side, found in rules.items()}
    a, b = known["a"], known["b"]
    if a is None or b is None or (a.kind is b.kind and math.isclose(a.value, b.value, rel_tol=1e-6)):
        return None
    sums, names = _tested(context, step, {"a": a, "b": b})
    if not names:
        return None
    side = _odd_side(context, {"a": a, "b": b})
    odd = {"a": a, "b": b}[side or ("a" if _SPECIFIC.index(a.kind) <= _SPECIFIC.index(b.kind) else "b")]
    parameters: dict[str, Any] = {"a": a.parameters, "b": b.parameters}
    if odd.kind is not Clip.NONE and a.kind is not b.kind:
        parameters["value"] = tidy(odd.value)
    summary, parameters = _compared(a, b, side, parameters)
    cause_id = "grad.scale" if odd.kind is Clip.SCALE else f"clip.{odd.kind.value}"
    if odd.kind is Clip.SCALE:
        matches = name_factor(context, step, odd.value)
        summary += f"; {matches}" if matches else ""
        parameters["factor"] = tidy(odd.value if odd is b else 1.0 / odd.value)
    return Cause(
        cause_id, summary, side=side, step=step, phase=Phase.CLIPPED_GRAD.label, names=names, parameters=parameters,
        explains=sums.share,
    )  # fmt: skip


def _rule(context: Context, step: int, side: str, found: ClipRules | None) -> _Rule | None:
    """The rule that a side is named for, with the constant as fitted."""
    if found is None or not found.known:
        return None
    kind, _ = found.named
    value = 0.0 if kind is Clip.NONE else found.limits[kind].value
    return _Rule(kind, value, _gradient_norm(context, step, side))


def _gradient_norm(context: Context, step: int, side: str) -> float:
    row = context.row(side, Phase.GRAD, step)
    names = () if row is None else tuple(name for name in row.positions if not name.startswith(REPORTED_PREFIX))
    return math.hypot(*(row.l2(name) for name in names)) if row is not None else 0.0


def _tested(context: Context, step: int, rules: dict[str, _Rule]) -> tuple[Sums, tuple[str, ...]]:
    """Undo the rules in numbers; the tensors for which it matters which rule holds."""
    sums, names = Sums(), []
    for name in context.differing(Phase.CLIPPED_GRAD, step):
        if name.startswith(REPORTED_PREFIX):
            continue
        own, concerned = Sums(), False
        for side, other in (("a", "b"), ("b", "a")):
            gradient = context.values(side, Phase.GRAD, step, name)
            clipped = context.values(side, Phase.CLIPPED_GRAD, step, name)
            if gradient is None or clipped is None or gradient.shape != clipped.shape:
                return Sums(), ()
            part = Sums()
            part.add(clipped, rules[other].apply(gradient), rules[side].apply(gradient))
            epsilon = EPSILON.get(context.dtype(side, Phase.CLIPPED_GRAD, step, name) or "", 0.0)
            concerned |= part.difference > (_CONCERNED * epsilon) ** 2 * squared(clipped)
            own += part
        if concerned:
            sums += own
            names.append(name)
    return sums, tuple(names)


def _odd_side(context: Context, rules: dict[str, _Rule]) -> str | None:
    """The side that does not do what it declares; else the one that clips, if one does; None if neither stands out."""
    breaks = {side: _contradicts(context.trace(side), rules[side]) for side in "ab"}
    if breaks["a"] != breaks["b"]:
        return "a" if breaks["a"] else "b"
    order = [_SPECIFIC.index(rules[side].kind) for side in "ab"]
    return None if order[0] == order[1] else "a" if order[0] < order[1] else "b"


def _contradicts(trace: Trace, rule: _Rule) -> bool:
    mode = str(trace.declared.get("clip.mode", "")).lower() or _trainer_mode(trace)
    return mode in ("none", "value", "norm") and mode != rule.kind.value


def _trainer_mode(trace: Trace) -> str:
    """What a trainer's own arguments ask for; empty if they do not say."""
    by_value = setting(trace, "trainer.args.max_grad_value")
    by_norm = setting(trace, "trainer.args.max_grad_norm")
    if by_value:
        return "value"
    return "" if by_norm is None else "norm" if by_norm > 0.0 else "none"


def _compared(a: _Rule, b: _Rule, side: str | None, parameters: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """One sentence on both sides, the odd one first; two constants of one kind with their ratio."""
    order = (("b", b), ("a", a)) if side == "b" else (("a", a), ("b", b))
    summary = "; ".join(f"{which} {rule.sentence}" for which, rule in order)
    if a.kind is not b.kind or a.kind is Clip.NONE:
        return summary, parameters
    ratio = b.value / a.value
    parameters = {**parameters, "ratio": tidy(ratio)}
    squared_ratio = max(ratio, 1.0 / ratio) ** 2
    shards = round(squared_ratio)
    if a.kind is Clip.NORM and 2 <= shards <= _MOST_SHARDS and abs(squared_ratio / shards - 1.0) <= 1e-4:
        parameters["shards"] = shards
        summary += f"; the ratio is the root of {shards}, as if by the norm of one of {shards} equal shards"
    return summary, parameters


def _shards_cause(context: Context, step: int, rules: dict[str, ClipRules | None]) -> Cause | None:
    """One side follows no single rule, and is clipped in several sets of tensors, each by the set's own norm."""
    unknown = [side for side in "ab" if (found := rules[side]) is not None and not found.known]
    if len(unknown) != 1:
        return None
    side, other = unknown[0], "b" if unknown[0] == "a" else "a"
    rule = _rule(context, step, other, rules[other])
    sets = _sets(context, step, side)
    if rule is None or len(sets) < 2:
        return None
    limits = [factor * (math.hypot(*norms) + NORM_EPS) for factor, norms, _ in sets if factor < 1.0 - _SAME_FACTOR]
    if not limits or max(limits) - min(limits) > 1e-3 * max(limits):
        return None
    limit = max(limits)
    sums = _undone_sets(context, step, side, rule, sets)
    names = tuple(name for factor, _, members in sets if factor < 1.0 - _SAME_FACTOR for name in members)
    summary = f"{side} clips {len(sets)} sets of tensors, each by its own norm at {tidy(limit)}"
    return Cause(
        "clip.norm", f"{summary}; {other} {rule.sentence}", side=side, step=step, phase=Phase.CLIPPED_GRAD.label,
        names=names, parameters={"value": tidy(limit), "shards": len(sets), other: rule.parameters}, explains=sums.share,
    )  # fmt: skip


_Set = tuple[float, list[float], list[str]]


def _sets(context: Context, step: int, side: str) -> list[_Set]:
    """Tensors of one side by the factor that they were multiplied with: factor, norms, names.  Empty if one is not."""
    row = context.row(side, Phase.CLIPPED_GRAD, step)
    sets: list[_Set] = []
    for name in _tensors(row):
        gradient, clipped = (context.values(side, phase, step, name) for phase in (Phase.GRAD, Phase.CLIPPED_GRAD))
        if gradient is None or clipped is None or gradient.shape != clipped.shape:
            return []
        size = squared(gradient)
        if size == 0.0:
            continue
        factor = float(np.dot(gradient.reshape(-1), clipped.reshape(-1))) / size
        if squared(clipped - factor * gradient) > 1e-4 * squared(clipped - gradient) + 1e-12 * squared(clipped):
            return []
        for known in sets:
            if abs(known[0] / factor - 1.0) <= _SAME_FACTOR:
                known[1].append(math.sqrt(size))
                known[2].append(name)
                break
        else:
            sets.append((factor, [math.sqrt(size)], [name]))
    return sets


def _tensors(row: Row | None) -> Sequence[str]:
    names = () if row is None else tuple(row.positions)
    return tuple(name for name in names if not name.startswith(REPORTED_PREFIX))


def _undone_sets(context: Context, step: int, side: str, rule: _Rule, sets: Sequence[_Set]) -> Sums:
    sums = Sums()
    under_other = _Rule(rule.kind, rule.value, _gradient_norm(context, step, side))
    for factor, _, names in sets:
        for name in names:
            gradient, clipped = (context.values(side, phase, step, name) for phase in (Phase.GRAD, Phase.CLIPPED_GRAD))
            if gradient is not None and clipped is not None:
                sums.add(clipped, under_other.apply(gradient), factor * gradient)
    return sums
