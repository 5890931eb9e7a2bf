"""`grad.stale`: a side's gradient holds that of the step before, because it was not cleared (or was not computed anew).

    added     g_b(t) = g_a(t) + g_b(t-1)        no zero_grad between the steps; c = sum (b - a) p / sum pp = 1
    instead   g_b(t) = g_b(t-1)                 the old gradient used again

p is the side's own accumulated gradient of the step before.  Undone: b - p, or a in place of b.  Sources: torch
`Optimizer.zero_grad`, which the caller must call.
"""

from __future__ import annotations

from typing import Final

from differ.causes.context import Context
from differ.causes.fit import Sums
from differ.result import Cause
from tracer.schema import REPORTED_PREFIX, Phase

ID: Final = "grad.stale"


def find(context: Context) -> list[Cause]:
    """One cause for each side and kind that the numbers bear out; the larger share wins."""
    causes = []
    for step, _, _ in context.groups(Phase.GRAD):
        names = [name for name in context.suspects(Phase.GRAD, step) if not name.startswith(REPORTED_PREFIX)]
        for side in "ab" if step > 1 else "":
            causes += [
                _cause(step, side, kind, found) for kind, found in _tested(context, step, side, names).items() if found
            ]
    return causes


def _tested(context: Context, step: int, side: str, names: list[str]) -> dict[str, list[tuple[str, Sums]]]:
    """Records that each kind explains, with their sums."""
    explained: dict[str, list[tuple[str, Sums]]] = {"added": [], "instead": []}
    for name in names:
        both = context.pair(Phase.GRAD, step, name)
        before = context.values(side, Phase.GRAD, step - 1, name)
        if both is None or before is None or before.shape != both[0].shape:
            continue
        mine, other = both if side == "a" else both[::-1]
        for kind, undone in (("added", mine - before), ("instead", mine - before + other)):
            sums = Sums()
            sums.add(other, mine, undone)
            if sums.share >= 0.99:
                explained[kind].append((name, sums))
    return explained


def _cause(step: int, side: str, kind: str, found: list[tuple[str, Sums]]) -> Cause:
    sums = Sums()
    for _, one in found:
        sums += one
    words = {
        "added": f"{side}'s gradients hold those of step {step - 1} as well: they were not cleared",
        "instead": f"{side} uses the gradients of step {step - 1} again",
    }
    return Cause(
        ID, f"{words[kind]} ({len(found):,} parameters)", side=side, step=step, phase=Phase.GRAD.label,
        names=tuple(name for name, _ in found), parameters={"kind": kind, "from_step": step - 1}, explains=sums.share,
    )  # fmt: skip
