"""Judge `opt_state` and `param` by replay: which optimizer rule gives each side's state and parameters from its own inputs.

Both sides under one rule, tensor by tensor: whatever differs came in with the gradients, the state or the settings, and is
judged there.  No rule in common: one finding for each set of aspects in which the rules differ, at the tensor with the
largest difference.  A side that has followed a rule and leaves it for one tensor is a finding whatever happened before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from differ.compare import Distance, distance
from differ.inputs import parameters_before
from differ.judges.across import judge_across, waived
from differ.judges.clip import largest_difference
from differ.judges.left_out import settle
from differ.replay.bundle import bundle, chunks
from differ.replay.fit import Fit
from differ.replay.gather import moment_inputs, update_inputs
from differ.replay.optimizer import MomentInputs, UpdateInputs
from differ.replay.rules import ORDER, SENTENCES
from differ.replay.rules.base import Rule, differing_aspects
from differ.result import Cause
from differ.session import KnownRules, RowPair, Session, value_finding
from tracer.dtypes import is_float
from tracer.schema import Phase, State

Inputs = UpdateInputs | MomentInputs


@dataclass(slots=True)
class SideFit:
    """How one side's tensor follows: rules that fit with their margins, and the nearest fit where none does.

    `missed`: the rules that do not fit with theirs, above 1.  `tried`: its inputs were recorded.  `moved`: it changed at
    all, so that following a rule says something.
    """

    rules: dict[Rule, float] = field(default_factory=dict)
    missed: dict[Rule, float] = field(default_factory=dict)
    nearest: Fit | None = None
    tried: bool = False
    moved: bool = False


@dataclass(slots=True)
class Outcome:
    """Both sides of one tensor."""

    name: str
    a: SideFit
    b: SideFit

    @property
    def common(self) -> Rule | None:
        """The rule that gives both sides, the tightest one."""
        shared = [how for how in self.a.rules if how in self.b.rules]
        if len(shared) == 1:
            return shared[0]
        return min(shared, key=lambda how: (max(self.a.rules[how], self.b.rules[how]), ORDER[how]), default=None)

    @property
    def margin(self) -> float:
        """Margin of the common rule."""
        how = self.common
        return 0.0 if how is None else max(self.a.rules[how], self.b.rules[how])

    @property
    def excess(self) -> float:
        """How many times its allowance the nearest rule misses one of the sides by; above 1 without a common rule."""
        a, b = ({**side.missed, **side.rules} for side in (self.a, self.b))
        return min((max(a[how], b[how]) for how in a if how in b), default=math.inf)


def judge_param(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """Parameters after the update."""
    _judge(session, pair, names)


def judge_opt_state(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    """Moments and momentum by replay; counters exactly; what an unknown optimizer keeps across the sides."""
    counters = [name for name in names if not is_float(pair.a.entry(name).dtype)]
    for name in counters:
        _judge_counter(session, pair, name)
    tensors = [name for name in names if name not in set(counters)]
    if pair.step == 0:
        for name in tensors:
            judge_across(session, pair, name)
        return
    _judge(session, pair, tensors)


def _judge(session: Session, pair: RowPair, names: Sequence[str]) -> None:
    known = session.known.setdefault(pair.phase, KnownRules())
    outcomes = []
    for portion in chunks(names, lambda name: math.prod(pair.a.shape(name))):
        a, b = ([_inputs(session, pair, side, name) for name in portion] for side in "ab")
        bundle(a)
        bundle(b)
        for name, mine, theirs in zip(portion, a, b, strict=True):
            outcome = Outcome(name, SideFit(), SideFit())
            _fit_both(session, outcome, known, mine, theirs)
            _remember(known, outcome)
            outcomes.append(outcome)
    family = pair.phase.label
    for side in "ab":
        if any(getattr(outcome, side).rules and getattr(outcome, side).moved for outcome in outcomes):
            session.followed[side].add(family)
    if sum(family in session.followed[side] for side in "ab") == 1 and _moves_alike(session, pair):
        for side in "ab":
            session.followed[side].add(family)
    apart: list[Outcome] = []
    settle(session, pair, {outcome.name: outcome.margin for outcome in outcomes if outcome.common is not None})
    for outcome in outcomes:
        if outcome.common is not None:
            continue
        if not (outcome.a.tried and outcome.b.tried):
            _note_not_replayed(session, pair, outcome)
            judge_across(session, pair, outcome.name)
        elif _unknown(session, family, outcome):
            _note_unknown(session, pair, "".join(s for s in "ab" if not getattr(outcome, s).rules))
            judge_across(session, pair, outcome.name)
        elif not waived(session, pair, outcome.name):
            apart.append(outcome)
    _find_apart(session, pair, apart)


def _moves_alike(session: Session, pair: RowPair) -> bool:
    """Whether some record of the row has changed in this step, to the same bits: there, what one side follows both do."""
    before = (
        parameters_before(session.a, pair.step)
        if pair.phase is Phase.PARAM
        else session.a.get(pair.phase, pair.step - 1)
    )
    for name in pair.a.positions:
        digest = pair.a.digest(name)
        if not digest or name not in pair.b.positions or not is_float(pair.a.entry(name).dtype):
            continue
        if digest != pair.b.digest(name) or pair.a.state(name) is not State.VALUE:
            continue
        if before is None or name not in before.positions or before.digest(name) != digest:
            return True
    return False


def _unknown(session: Session, family: str, outcome: Outcome) -> bool:
    """Whether the optimizer is one that is not known here: neither side fits, or one that never has, and the other does
    not tell either.

    Moments that follow make it a known one: an update that then does not is a divergence, not another optimizer.  So is
    an update that does not where the other side's does: whatever it follows, it is not what the other follows.
    """
    if not outcome.a.rules and not outcome.b.rules:
        return True
    known = {family, Phase.OPT_STATE.label}
    for side, other in ((outcome.a, outcome.b), (outcome.b, outcome.a)):
        name = "a" if side is outcome.a else "b"
        if not side.rules and not known & session.followed[name] and not other.moved:
            return True
    return False


def _remember(known: KnownRules, outcome: Outcome) -> None:
    """Keep what this tensor says of the next ones."""
    if outcome.common is not None:
        if outcome.common not in known.common:
            known.common.insert(0, outcome.common)
    elif outcome.a.rules and outcome.b.rules:
        nearest = _nearest(outcome.a.rules, outcome.b.rules)
        if nearest not in known.parted:
            known.parted.insert(0, nearest)
    else:
        for side in "ab":
            own = known.own[side]
            own.extend(how for how in getattr(outcome, side).rules if how not in own)


def _fit_both(session: Session, outcome: Outcome, known: KnownRules, a: Inputs | None, b: Inputs | None) -> None:
    """Try the rules that fitted other tensors first; all of them only if those do not tell both sides."""
    outcome.a.tried, outcome.b.tried = a is not None, b is not None
    if a is None or b is None:
        return
    outcome.a.moved, outcome.b.moved = (_moved(x) for x in (a, b))
    for how in known.common:
        _try(session, a, how, outcome.a)
        _try(session, b, how, outcome.b)
        if outcome.common is not None:
            return
    for mine, theirs in known.parted:
        for how in (mine, theirs):
            _try(session, a, how, outcome.a)
            _try(session, b, how, outcome.b)
        if outcome.common is not None or (mine in outcome.a.rules and theirs in outcome.b.rules):
            return
    sides = ((a, outcome.a, known.own["a"]), (b, outcome.b, known.own["b"]))
    for inputs, side, own in sides:
        if not side.rules:
            _try_all(session, inputs, side, own, first=True)
        if not side.rules:
            _try_all(session, inputs, side, inputs.rules, first=True)
    if outcome.common is None and outcome.a.rules and outcome.b.rules:
        # In how few aspects the two differ is told by all that fit.
        for inputs, side, _ in sides:
            _try_all(session, inputs, side, inputs.rules)


def _try_all(session: Session, inputs: Inputs, side: SideFit, rules: Iterable[Rule], *, first: bool = False) -> None:
    """Try rules; `first`: until one fits."""
    for how in rules:
        _try(session, inputs, how, side)
        if first and side.rules:
            return


def _moved(inputs: Inputs) -> bool:
    before, after = inputs.before, inputs.after
    return before.dtype != after.dtype or not bool((before.stored == after.stored).all())


def _inputs(session: Session, pair: RowPair, side: str, name: str) -> Inputs | None:
    rows, row = (session.a, pair.a) if side == "a" else (session.b, pair.b)
    return update_inputs(rows, row, name) if pair.phase is Phase.PARAM else moment_inputs(rows, row, name)


def _try(session: Session, inputs: Inputs, how: Rule, side: SideFit) -> None:
    if how in side.rules or how in side.missed or how not in inputs.rules:
        return
    tolerance = session.policy.replay(inputs.after.dtype)
    fit = inputs.fit(how, tolerance)
    if fit.ok:
        side.rules[how] = fit.margin
        return
    side.missed[how] = fit.margin
    if side.nearest is None or fit.margin < side.nearest.margin:
        side.nearest = fit


def _judge_counter(session: Session, pair: RowPair, name: str) -> None:
    """`step` and the like: equal numbers; a difference goes on for ever, so it is found once."""
    a, b = pair.a.read(name), pair.b.read(name)
    measured = distance(a, b)
    if measured.equal:
        session.measured(pair, name, 0.0, 0.0)
    elif not session.first_time(pair.phase, name):
        session.tally.repeated(pair.phase, name)
    else:
        session.measured(pair, name, measured.max_abs, 0.0, diverged=True)
        session.tally.find(
            value_finding(pair, name, measured, (a, b), observed=None, tolerance=0.0, required=measured.max_abs)
        )


def _note_not_replayed(session: Session, pair: RowPair, outcome: Outcome) -> None:
    for side in "ab":
        if not getattr(outcome, side).tried:
            summary = f"{side} did not record what {pair.phase.label} is replayed from; compared across the sides"
            session.note_once(Cause("rule.unrecorded", summary, side=side, step=pair.step, phase=pair.phase.label))


def _note_unknown(session: Session, pair: RowPair, sides: str) -> None:
    for side in sides:
        summary = f"{side} follows no known optimizer rule in {pair.phase.label}"
        session.note_once(Cause("rule.unknown", summary, side=side, step=pair.step, phase=pair.phase.label))


def _find_apart(session: Session, pair: RowPair, apart: Sequence[Outcome]) -> None:
    """Group tensors by the aspects that differ; one finding a group, unless an earlier one said the same."""
    groups: dict[frozenset[str], list[Outcome]] = {}
    for outcome in apart:
        groups.setdefault(_aspects(outcome), []).append(outcome)
    for aspects, outcomes in groups.items():
        # Decay that is added to the gradient shows in the moments and, by its absence, in the parameters: one thing.
        # Where one of the two is left out of the judgement it is none.
        judged = session.options.wants_phase(pair.phase)
        key = ("optimizer", aspects, judged) if aspects else ("unruled", pair.phase)
        if not session.first_time(*key):
            for outcome in outcomes:
                session.tally.repeated(pair.phase, outcome.name)
            continue
        _find_group(session, pair, outcomes)


def _aspects(outcome: Outcome) -> frozenset[str]:
    """The fewest aspects in which a rule of a differs from a rule of b; empty where a side has none."""
    pairs = [differing_aspects(x, y) for x in outcome.a.rules for y in outcome.b.rules]
    return min(pairs, key=lambda aspects: (len(aspects), sorted(aspects)), default=frozenset())


def _nearest(a: Iterable[Rule], b: Iterable[Rule]) -> tuple[Rule, Rule]:
    """A rule of each side that differ in the fewest aspects."""
    return min(
        ((x, y) for x in a for y in b),
        key=lambda both: (len(differing_aspects(*both)), ORDER[both[0]] + ORDER[both[1]], ORDER[both[0]]),
    )


def _find_group(session: Session, pair: RowPair, outcomes: Sequence[Outcome]) -> None:
    outcome, measured = _foremost(pair, outcomes)
    name = outcome.name
    # What the replay allows, and what it would have to; how far the sides are from each other is another number.
    allowed = session.policy.replay(pair.dtype(name)).relative
    session.measured(pair, name, outcome.excess, 1.0, diverged=True)
    session.tally.explained(pair.phase, len(outcomes) - 1)
    stray = _stray(outcome)
    session.tally.find(
        value_finding(
            pair, name, measured, (pair.a.read(name), pair.b.read(name)), observed=measured.rel_l2(), tolerance=allowed,
            required=allowed * outcome.excess, at=stray.at if stray is not None and stray.residual2 > 0.0 else None,
            detail=_describe(outcome),
        )
    )  # fmt: skip
    for side, fit in (("a", outcome.a), ("b", outcome.b)):
        if fit.rules:
            choices = dict(_shown(outcome, side))
            summary = f"{side} applies " + ", ".join(SENTENCES[item] for item in sorted(choices.items()))
            session.note_once(
                Cause("rule", summary, side=side, step=pair.step, phase=pair.phase.label, parameters=choices)
            )


def _foremost(pair: RowPair, outcomes: Sequence[Outcome]) -> tuple[Outcome, Distance]:
    """The tensor that stands for a group: the largest difference, or the worst miss where a side follows no rule."""
    if all(outcome.a.rules and outcome.b.rules for outcome in outcomes):
        name, measured = largest_difference(pair, [outcome.name for outcome in outcomes])
        return next(outcome for outcome in outcomes if outcome.name == name), measured
    outcome = max(sorted(outcomes, key=lambda one: one.name), key=lambda one: one.excess)
    return outcome, distance(pair.a.read(outcome.name), pair.b.read(outcome.name))


def _stray(outcome: Outcome) -> Fit | None:
    """Nearest fit of the side that follows no rule, if exactly one does not."""
    if bool(outcome.a.rules) == bool(outcome.b.rules):
        return None
    return outcome.b.nearest if outcome.a.rules else outcome.a.nearest


def _shown(outcome: Outcome, side: str) -> Rule:
    """The aspects to print of one side's rule: those that differ, or all where the other side has no rule."""
    mine, other = (outcome.a, outcome.b) if side == "a" else (outcome.b, outcome.a)
    if not other.rules:
        return min(mine.rules, key=ORDER.__getitem__)
    best = _nearest(mine.rules, other.rules)
    aspects = differing_aspects(*best)
    return tuple(item for item in best[0] if item[0] in aspects)


def _describe(outcome: Outcome) -> str:
    """One sentence on both sides."""
    parts = []
    for side, fit, other in (("a", outcome.a, outcome.b), ("b", outcome.b, outcome.a)):
        if fit.rules and other.rules:
            parts.append(f"{side}: " + ", ".join(SENTENCES[item] for item in _shown(outcome, side)))
        elif fit.rules:
            parts.append(f"{side} follows from its own inputs")
        elif fit.nearest is not None:
            numbers = f"recorded {fit.nearest.recorded:.9g}, replayed {fit.nearest.expected:.9g}"
            parts.append(f"{side} does not follow from its own inputs ({numbers})")
    return "; ".join(parts)
