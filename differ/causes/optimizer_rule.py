"""`optimizer.rule`: the two sides follow the rules of different optimizers.

Which optimizer it is comes from the numbers: of the known rules, see `differ.replay.rules`, the one that gives the recorded
moments or parameters from a side's own gradients, state and settings.  Undone: each side replayed under its own rule instead
of the other's.  Adam and RAdam keep the same state, as do SGD and Muon, so that only the values tell them apart.

Of optimizers that keep other state neither can be replayed under the other's rule, so no share is claimed.  Their settings
and their state are on one side only, and no setting of one is 0 in the other.

Source: an optimizer registered under another's name, a plug-in whose class replaces the library's; a default that two
libraries do not share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from differ.causes.context import Context
from differ.causes.optimizers import optimizers, settings_of, word_of
from differ.causes.updates import apart, between, how_many, parameters_named
from differ.replay.rules.base import OPTIMIZER
from differ.result import Cause, Finding, Kind
from tracer.schema import Phase

ID: Final = "optimizer.rule"


def find(context: Context) -> list[Cause]:
    """One cause for each pair of optimizers in a phase; what cannot be tried out is said once."""
    causes: list[Cause] = []
    told: list[Cause] = []
    for step, phase, found in context.groups(Phase.HPARAMS, Phase.OPT_STATE, Phase.PARAM):
        exchanged = _exchanged(context, step, phase) if phase is not Phase.HPARAMS else []
        causes += exchanged
        if not exchanged and not told:
            told = _told(context, step, phase, found)
            causes += told
    return causes


def _exchanged(context: Context, step: int, phase: Phase) -> list[Cause]:
    """From replays of either side under the other's rule."""
    causes = []
    for (a, b), group in between(context, phase, step, OPTIMIZER).items():
        names = parameters_named(group.names, phase)
        total = len(parameters_named(context.differing(phase, step), phase))
        words = [word_of(context, side, frozenset({family})) for side, family in (("a", a), ("b", b))]
        causes.append(
            Cause(
                ID, f"a follows {words[0]}, b {words[1]}{how_many(names, total)}", step=step, phase=phase.label, names=names,
                parameters={"a": a, "b": b}, explains=group.sums.share,
            )
        )  # fmt: skip
    return causes


def _told(context: Context, step: int, phase: Phase, found: Sequence[Finding]) -> list[Cause]:
    """From what each side follows for itself, where the rule of one can say nothing of the other."""
    both = optimizers(context, step)
    names = [] if both is None else _named(context, step, phase, found)
    if both is None or not names:
        return []
    summary = f"a follows {both.a}, b {both.b}" if both.followed else f"a's optimizer is {both.a}, b's {both.b}"
    parameters = dict(zip("ab", both.known, strict=True))
    return [Cause(ID, summary, step=step, phase=phase.label, names=tuple(names), parameters=parameters)]


def _named(context: Context, step: int, phase: Phase, found: Sequence[Finding]) -> Sequence[str]:
    """What two optimizers account for: settings but a rate that both have, state of one side only, parameters."""
    missing = [str(f.name) for f in found if f.kind in (Kind.MISSING_A, Kind.MISSING_B)]
    if phase is Phase.HPARAMS:
        settings = [str(f.name) for f in settings_of(context, step)]
        return [name for name in settings if name in missing or not name.endswith(".lr")]
    if phase is Phase.OPT_STATE:
        return parameters_named(missing, phase)
    return [one.name for one in apart(context, phase, step) if one.ways(OPTIMIZER) is not None]
