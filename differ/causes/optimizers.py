"""Which optimizer each side has, and causes of the settings that it records.

    numbers   the families whose rules give a side's parameters from its own gradients, state and settings; of a side that none
              gives, those that keep such state
    classes   the class that was found, where a side has no such numbers and the settings of one are not those of the other

Two optimizers have two sets of settings: that one of them has no eps is not an eps of 0.  No finder: registers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from differ.causes.context import Context
from differ.causes.updates import fit, inputs_of
from differ.replay.gather import around, hyper_of
from differ.replay.rules import SENTENCES
from differ.replay.rules.base import OPTIMIZER, Rule
from differ.result import Cause, Finding, Kind
from tracer.dtypes import is_float
from tracer.schema import Phase

CLASS: Final = "optimizer.class"
# The smallest tensors of the first steps tell; the rest costs time and says the same.
_TENSORS: Final = 4
_STEPS: Final = 2

Families = frozenset[str]


@dataclass(frozen=True, slots=True)
class Optimizers:
    """Two different optimizers, in words and by family or class; `followed`: the numbers say so."""

    a: str
    b: str
    known: tuple[str, str]
    followed: bool


def optimizers(context: Context, step: int) -> Optimizers | None:
    """The optimizers of the two sides from a step on; None if they are one, or it cannot be told.  Computed once."""
    found: Optimizers | None = context.rows_a.remember(
        ("optimizers", id(context), step), lambda: _optimizers(context, step)
    )
    return found


def _optimizers(context: Context, step: int) -> Optimizers | None:
    a, b = (_families(context, side, step) for side in "ab")
    if a and b:
        known = (" or ".join(sorted(a)), " or ".join(sorted(b)))
        return None if a & b else Optimizers(word_of(context, "a", a), word_of(context, "b", b), known, followed=True)
    classes = [context.trace(side).observed.get(CLASS) for side in "ab"]
    if not all(isinstance(name, str) and name for name in classes):
        return None
    one, other = (str(name) for name in classes)
    # Adam and AdamW, Lion and Lion8bit are variants of one.
    alike = one.lower() in other.lower() or other.lower() in one.lower()
    missing = any(f.step == step and f.kind in (Kind.MISSING_A, Kind.MISSING_B) for f in settings_of(context, step))
    return None if alike or not missing else Optimizers(one, other, (one, other), followed=False)


def word_of(context: Context, side: str, families: Families) -> str:
    """The class that a side's trace names, if it is one of the families, else these."""
    name = context.trace(side).observed.get(CLASS)
    if isinstance(name, str) and any(name.lower() in (family, f"{family}w") for family in families):
        return name
    return " or ".join(SENTENCES[OPTIMIZER, family] for family in sorted(families))


def _families(context: Context, side: str, step: int) -> Families:
    """The families that a side's updates have in common; empty if nothing tells."""
    found: Families | None = None
    for at in [t for t in context.trace(side).steps if t >= step][:_STEPS]:
        for families in _seen(context, side, at):
            found = families if found is None else found & families
    return found or frozenset()


def _seen(context: Context, side: str, step: int) -> Iterator[Families]:
    """For each of some parameters, the families of the rules that it follows, or may follow."""
    row, at = context.row(side, Phase.PARAM, step), around(context.rows(side), step)
    sizes = {} if row is None else {n: math.prod(row.shape(n)) for n in row.positions if is_float(row.entry(n).dtype)}
    tensors = [inputs_of(context, side, Phase.PARAM, step, name) for name in sorted(sizes, key=lambda n: (sizes[n], n))]
    known = [inputs for inputs in tensors if inputs is not None][:_TENSORS]
    for inputs in known:
        yield _of([how for how in inputs.rules if fit(context, inputs, how).ok] or inputs.rules)
    if not known and at.state is not None:
        for name in sorted(at.state.float_state)[:_TENSORS]:
            hyper = at.hyper(name)
            if hyper is not None and (possible := at.rules(hyper, at.kinds(name))):
                yield _of(possible)


def _of(rules: Sequence[Rule]) -> Families:
    return frozenset(dict(how)[OPTIMIZER] for how in rules)


def settings_of(context: Context, step: int) -> list[Finding]:
    """Findings about settings of groups that both sides have: one that a side has not got has no settings there."""
    groups = [{name.partition(".")[0] for name in context.names(side, Phase.HPARAMS, step)} for side in "ab"]
    found = (f for f in context.findings_in(Phase.HPARAMS) if f.step == step and f.name is not None)
    return [f for f in found if f.kind is not Kind.STATE and str(f.name).partition(".")[0] in groups[0] & groups[1]]


def settings_causes(context: Context, cause_id: str, keys: Sequence[str], words: str) -> list[Cause]:
    """Causes for findings in `hparams`: a recorded setting differs.  `words` names it: `weight decay`.

    None where the sides have two optimizers: that is the cause.  Undone: one side's value in place of the other's.
    """
    causes = []
    for step, _, found in context.groups(Phase.HPARAMS):
        if optimizers(context, step) is not None:
            continue
        causes += [
            _setting(context, cause_id, finding, words, several=len(keys) > 1)
            for finding in settings_of(context, step)
            if str(finding.name).rpartition(".")[2] in keys
        ]
        causes += _dealt_otherwise(context, cause_id, keys, words, step, found)
    return causes


def _setting(context: Context, cause_id: str, finding: Finding, words: str, *, several: bool) -> Cause:
    name, step = str(finding.name), finding.step
    group, _, key = name.partition(".")
    a, b = (context.scalar(side, Phase.HPARAMS, step, name) for side in "ab")
    groups = [other for other in context.names("a", Phase.HPARAMS, step) if other.endswith(".lr")]
    where = f" in {group}" if len(groups) > 1 else ""
    sides = ", ".join(
        f"{side} has none" if value is None else f"{side} {value:g}" for side, value in (("a", a), ("b", b))
    )
    return Cause(
        cause_id, f"{words} ({key}){where}: {sides}" if several else f"{words}{where}: {sides}", step=step,
        phase=Phase.HPARAMS.label, names=(name,), parameters={"setting": key, "a": a, "b": b}, explains=1.0,
    )  # fmt: skip


def _dealt_otherwise(
    context: Context, cause_id: str, keys: Sequence[str], words: str, step: int, found: Sequence[Finding]
) -> list[Cause]:
    """Parameters that are in another group on either side, by the values of one setting."""
    groups: dict[tuple[str, float, float], list[str]] = {}
    for name in (f.name for f in found if f.name is not None and f.kind is Kind.STATE):
        hypers = [hyper_of(context.rows(side), step, name) for side in "ab"]
        for key in keys if None not in hypers else ():
            a, b = (float(getattr(hyper, key)) for hyper in hypers)
            if a != b:
                groups.setdefault((key, a, b), []).append(name)
    return [
        Cause(
            cause_id, f"{words} of {names[0] if len(names) == 1 else f'{len(names):,} parameters'}: a {a:g}, b {b:g}",
            step=step, phase=Phase.HPARAMS.label, names=tuple(names), parameters={"setting": key, "a": a, "b": b},
            explains=1.0,
        )
        for (key, a, b), names in groups.items()
    ]  # fmt: skip
