"""What finders of optimizer causes share: which tensors follow which rule, and how much a change of rule undoes.

    difference   sum over sides |recorded - replay of its own inputs under the other side's rule|^2
    residual     sum over sides |recorded - replay of its own inputs under its own rule|^2

Each side is replayed from its own recorded inputs, so what came in with gradients or weights that differ already is not
part of either sum.  A side that follows no rule (a stray) is replayed with the inputs or settings that a finder supposes.
No finder: registers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Sums
from differ.policy import ReplayTolerance
from differ.replay.bundle import bundle, chunks
from differ.replay.fit import Fit
from differ.replay.gather import moment_inputs, update_inputs
from differ.replay.optimizer import MomentInputs, UpdateInputs
from differ.replay.rules import ORDER
from differ.replay.rules.base import OPTIMIZER, Hyper, Rule, differing_aspects
from tracer.dtypes import is_float
from tracer.names import split_state_name
from tracer.schema import Phase

Inputs = UpdateInputs | MomentInputs
PHASES: Final = (Phase.OPT_STATE, Phase.PARAM)


@dataclass(frozen=True, slots=True)
class Followed:
    """Rules that each side's tensor follows from its own inputs; the tightest first.  Empty: a stray."""

    name: str
    a: tuple[Rule, ...]
    b: tuple[Rule, ...]

    def of(self, side: str) -> tuple[Rule, ...]:
        """The rules of a side."""
        return self.a if side == "a" else self.b

    @property
    def common(self) -> Rule | None:
        """A rule that gives both sides."""
        return next((how for how in self.a if how in self.b), None)

    @property
    def nearest(self) -> tuple[Rule, Rule] | None:
        """A rule of each side that differ in the fewest aspects; None if a side has none."""
        pairs = [(x, y) for x in self.a for y in self.b]
        if not pairs:
            return None
        return min(pairs, key=lambda both: (len(differing_aspects(*both)), ORDER[both[0]] + ORDER[both[1]]))

    def ways(self, aspect: str) -> tuple[str, str] | None:
        """The choices of one aspect in which the nearest rules of the two sides differ; None if they do not, or are of
        two optimizers.
        """
        rules = self.nearest
        if rules is None:
            return None
        a, b = (dict(how) for how in rules)
        known = aspect in a and aspect in b and (aspect == OPTIMIZER or a.get(OPTIMIZER) == b.get(OPTIMIZER))
        return (a[aspect], b[aspect]) if known and a[aspect] != b[aspect] else None

    @property
    def stray(self) -> str | None:
        """The side that follows no rule, if exactly one does."""
        return None if bool(self.a) == bool(self.b) else "b" if self.a else "a"


def followed(context: Context, phase: Phase, step: int) -> tuple[Followed, ...]:
    """The float tensors of a phase whose bits differ and whose inputs both sides recorded.  Computed once."""
    found: tuple[Followed, ...] = context.rows_a.remember(
        ("followed", id(context), phase, step), lambda: tuple(_followed(context, phase, step))
    )
    return found


def apart(context: Context, phase: Phase, step: int) -> tuple[Followed, ...]:
    """Those of `followed` that no rule gives on both sides."""
    return tuple(one for one in followed(context, phase, step) if one.common is None)


def strays(context: Context, phase: Phase, step: int) -> Iterator[tuple[str, list[str]]]:
    """Each side that follows no rule somewhere, with the names of those tensors."""
    for side in "ab":
        names = [one.name for one in apart(context, phase, step) if one.stray == side]
        if names:
            yield side, names


def _followed(context: Context, phase: Phase, step: int) -> Iterator[Followed]:
    row = context.row("a", phase, step)
    names = context.differing(phase, step)
    for portion in chunks(names, lambda name: 0 if row is None else math.prod(row.shape(name))):
        a, b = ([inputs_of(context, side, phase, step, name) for name in portion] for side in "ab")
        bundle(a)
        bundle(b)
        for name, mine, theirs in zip(portion, a, b, strict=True):
            if mine is not None and theirs is not None:
                yield Followed(name, _rules(context, mine), _rules(context, theirs))


def inputs_of(context: Context, side: str, phase: Phase, step: int, name: str) -> Inputs | None:
    """What one side's update or moment is replayed from; None if it was not recorded."""
    rows, row = context.rows(side), context.row(side, phase, step)
    if row is None or name not in row.positions or not is_float(row.entry(name).dtype):
        return None
    return update_inputs(rows, row, name) if phase is Phase.PARAM else moment_inputs(rows, row, name)


def _rules(context: Context, inputs: Inputs) -> tuple[Rule, ...]:
    tolerance = tolerance_of(context, inputs)
    fits = {how: inputs.fit(how, tolerance) for how in inputs.rules}
    return tuple(sorted((how for how, fit in fits.items() if fit.ok), key=lambda how: (fits[how].margin, ORDER[how])))


def tolerance_of(context: Context, inputs: Inputs) -> ReplayTolerance:
    """What rounding may cost this replay."""
    return context.policy.replay(inputs.after.dtype)


def fit(context: Context, inputs: Inputs, how: Rule) -> Fit:
    """One replay."""
    return inputs.fit(how, tolerance_of(context, inputs))


@dataclass(slots=True)
class Ways:
    """Tensors whose two sides choose differently in one aspect, and what exchanging the rules undoes."""

    names: list[str] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)


def between(context: Context, phase: Phase, step: int, aspect: str) -> dict[tuple[str, str], Ways]:
    """The tensors of a phase by the ways in which a and b differ in an aspect, where that explains them."""
    found: dict[tuple[str, str], Ways] = {}
    for one in apart(context, phase, step):
        ways = one.ways(aspect)
        own = exchanged(context, phase, step, one) if ways is not None else Sums()
        if ways is not None and own.share >= SHOWN:
            group = found.setdefault(ways, Ways())
            group.names.append(one.name)
            group.sums += own
    return found


def exchanged(context: Context, phase: Phase, step: int, one: Followed) -> Sums:
    """Both sides under the other's rule against both under their own; nothing if a side is a stray."""
    sums = Sums()
    rules = one.nearest
    if rules is None:
        return sums
    for side, own, other in (("a", rules[0], rules[1]), ("b", rules[1], rules[0])):
        inputs = inputs_of(context, side, phase, step, one.name)
        if inputs is not None:
            sums += Sums(fit(context, inputs, other).residual2, fit(context, inputs, own).residual2)
    return sums


def supposed(
    context: Context,
    side: str,
    phase: Phase,
    step: int,
    name: str,
    suppose: Callable[[Inputs], Inputs],
    rules: Sequence[Rule],
) -> tuple[Sums, bool]:
    """A stray under a supposition: best residual over some rules before and after it, and whether it then follows."""
    inputs = inputs_of(context, side, phase, step, name)
    if inputs is None:
        return Sums(), False
    changed = suppose(inputs)
    usable = [how for how in rules if how in inputs.rules] or list(inputs.rules)
    before = min(fit(context, inputs, how).residual2 for how in usable)
    after = min((fit(context, changed, how) for how in usable), key=lambda found: found.residual2)
    return Sums(before, after.residual2), after.ok


def with_hyper(**settings: float) -> Callable[[Inputs], Inputs]:
    """The supposition that some settings were other than recorded."""

    def suppose(inputs: Inputs) -> Inputs:
        hyper: Hyper = replace(inputs.hyper, **settings)  # type: ignore[arg-type]
        return replace(inputs, hyper=hyper)

    return suppose


def parameters_named(names: Sequence[str], phase: Phase) -> tuple[str, ...]:
    """Parameters that records belong to, each once, in order."""
    if phase is not Phase.OPT_STATE:
        return tuple(names)
    return tuple(dict.fromkeys(split_state_name(name)[0] or name for name in names))


def how_many(names: Sequence[str], total: int) -> str:
    """` for 3 of 12 parameters`, or nothing for all of them."""
    if len(names) >= total:
        return ""
    return f" for {names[0]}" if len(names) == 1 else f" for {len(names):,} of {total:,} parameters"
