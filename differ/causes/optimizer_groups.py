"""`optimizer.groups`: the two sides deal their parameters out to different numbers of groups, or of optimizers.

Settings of a group that a side has not got are recorded on the other side only, all of them: the share is 1.  Who is in it is
what the trace of that side says.  Parameters that are in another one of the same groups are found each for itself.

Source: one optimizer for each kind of adapter factor (LoRA+, arXiv:2402.12354), groups with and without weight decay, a second
optimizer that one side does not have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from differ.causes.context import Context
from differ.causes.words import count, which
from differ.replay.gather import members
from differ.result import Cause, Kind
from tracer.schema import Phase

ID: Final = "optimizer.groups"

_GROUP: Final = "group"
# Groups that a sentence lists; more are counted.
_LISTED: Final = 2


def find(context: Context) -> list[Cause]:
    """One cause for the first step at which a side has groups of its own."""
    for step, _, found in context.groups(Phase.HPARAMS):
        a, b = (_groups(context, side, step) for side in "ab")
        missing = [str(f.name) for f in found if f.kind in (Kind.MISSING_A, Kind.MISSING_B)]
        names = [name for name in missing if name.partition(".")[0] in set(a) ^ set(b)]
        if names and a and b:
            return [_cause(context, step, a, b, names)]
    return []


def _groups(context: Context, side: str, step: int) -> list[str]:
    names = (name.partition(".")[0] for name in context.names(side, Phase.HPARAMS, step))
    return list(dict.fromkeys(name for name in names if name.startswith(_GROUP)))


def _cause(context: Context, step: int, a: Sequence[str], b: Sequence[str], names: Sequence[str]) -> Cause:
    extra = [_said(context, side, step, group) for side, mine, other in (("a", a, b), ("b", b, a))
             for group in mine if group not in other]  # fmt: skip
    more = f" and {count(len(extra) - _LISTED, 'more group')}" if len(extra) > _LISTED else ""
    summary = f"a has {count(len(a), 'group')} of parameters, b {len(b)}: {'; '.join(extra[:_LISTED])}{more}"
    parameters = {"a": len(a), "b": len(b)}
    return Cause(
        ID, summary, step=step, phase=Phase.HPARAMS.label, names=tuple(names), parameters=parameters, explains=1.0
    )  # fmt: skip


def _said(context: Context, side: str, step: int, group: str) -> str:
    """`b's group1 (lr 0.01) holds 6 of 12 parameters in layers 0–1`."""
    known = members(context.rows(side))
    held = [name for name, where in known.items() if where == group]
    lr = context.scalar(side, Phase.HPARAMS, step, f"{group}.lr")
    rate = "" if lr is None else f" (lr {lr:g})"
    return f"{side}'s {group}{rate} holds {which(held, len(known))}" if held else f"{side} has {group}{rate}"
