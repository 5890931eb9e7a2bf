"""`optimizer.unheld`: parameters that a side trains, and that its optimizer does not hold.

A parameter that is trainable at init and gets a gradient, of which there is no clipped gradient and no state where the others of
its side have them, and which stays what it was: its optimizer was never given it.  The records are on the other side only, so
that the share is 1.  What follows is no news: the model of the next step, and gradients of the parameter, which an optimizer
that does not hold it does not clear.

Source: an optimizer that is built from a filter on names, or from the parameters as they were before some were added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from differ.causes.context import Context
from differ.causes.words import which
from differ.estimate import is_trainable
from differ.inputs import LORA_A, LORA_B, LORA_SCALE, is_unheld
from differ.result import Cause, Finding, Kind
from tracer.names import split_state_name
from tracer.schema import RNG_PREFIX, Phase

ID: Final = "optimizer.unheld"

AFTER: Final = (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)


def find(context: Context) -> list[Cause]:
    """At most one cause for a side and a step, in the first phase that lacks the parameters."""
    causes: list[Cause] = []
    known: set[tuple[str, str]] = set()
    for step, phase, found in context.groups(*AFTER):
        for side, kind in (("a", Kind.MISSING_A), ("b", Kind.MISSING_B)):
            owners = dict.fromkeys(_owner(finding, phase) for finding in found if finding.kind is kind)
            names = [n for n in owners if (side, n) not in known and is_unheld(context.rows(side), step, n)]
            known |= {(side, name) for name in names}
            if names:
                causes.append(_cause(context, side, step, phase, names))
    return causes


def _owner(finding: Finding, phase: Phase) -> str:
    """The parameter that a record belongs to; empty for a whole row."""
    name = finding.name or ""
    return split_state_name(name)[0] if phase is Phase.OPT_STATE else name


def _trained(context: Context, side: str) -> frozenset[str]:
    """The parameters that a side trains, whether its trace holds them or sketches of them."""
    row = context.row(side, Phase.INIT, 0)
    names = () if row is None else (name for name in row.positions if is_trainable(row, name))
    return frozenset(name for name in names if not name.startswith(RNG_PREFIX) and not name.endswith(LORA_SCALE))


def _cause(context: Context, side: str, step: int, phase: Phase, names: Sequence[str]) -> Cause:
    other = "a" if side == "b" else "b"
    trained = _trained(context, side)
    summary = (
        f"{side}'s optimizer does not hold {_what(names, trained)}: trainable there, and never updated; {other}'s does"
    )
    parameters = {"count": len(names), "of": len(trained)}
    return Cause(
        ID, summary, side=side, step=step, phase=phase.label, names=tuple(names), parameters=parameters, explains=1.0
    )  # fmt: skip


def _what(names: Sequence[str], trained: frozenset[str]) -> str:
    """All of one kind of adapter factor by its kind, else as any parameters."""
    for ending in (LORA_A, LORA_B):
        if set(names) == {name for name in trained if name.endswith(ending)} and len(names) > 1:
            return f"{ending.split('.')[1]} ({len(names):,} of {len(trained):,} parameters)"
    return which(names, len(trained))
