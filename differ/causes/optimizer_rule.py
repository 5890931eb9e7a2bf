"""`optimizer.rule`: the two sides follow the rules of different optimizers.

Which optimizer it is comes from the numbers: of the known rules, see `differ.replay.rules`, the one that gives the recorded
moments or parameters from a side's own gradients, state and settings.  Undone: each side replayed under its own rule instead
of the other's.  Adam and RAdam keep the same state, as do SGD and Muon, so that only the values tell them apart.

Source: an optimizer registered under another's name, a plug-in whose class replaces the library's.
"""

from __future__ import annotations

from typing import Final

from differ.causes.context import Context
from differ.causes.updates import between, how_many, parameters_named
from differ.replay.rules import SENTENCES
from differ.replay.rules.base import OPTIMIZER
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "optimizer.rule"


def find(context: Context) -> list[Cause]:
    """One cause for each pair of optimizers in a phase."""
    causes = []
    for step, phase, _ in context.groups(Phase.OPT_STATE, Phase.PARAM):
        for (a, b), group in between(context, phase, step, OPTIMIZER).items():
            names = parameters_named(group.names, phase)
            total = len(parameters_named(context.differing(phase, step), phase))
            words = {key: SENTENCES[OPTIMIZER, name] for key, name in (("a", a), ("b", b))}
            summary = f"a follows {words['a']}, b {words['b']}{how_many(names, total)}"
            causes.append(
                Cause(
                    ID, summary, step=step, phase=phase.label, names=names, parameters={"a": a, "b": b},
                    explains=group.sums.share,
                )
            )  # fmt: skip
    return causes
