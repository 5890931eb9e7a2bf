"""`model.mode`: one side computes what differs with its model in training mode, the other in evaluation mode.

    mode(step)   as observed at the first step, and from then on as the record `reported.model.training` of a step says
    claimed      the modes of the first finding's step differ, and dropout of the side that trains is not known to be 0

This is an observation about the step and not a fit: nothing is undone, and any tested cause of the same finding is shown in
its place.  Source: `model.eval()` for an evaluation in between, and no `model.train()` after it.
"""

from __future__ import annotations

from typing import Final

from differ.causes.context import Context
from differ.result import Cause
from tracer.modes import KEY, MIXED, Mode
from tracer.reader import Trace
from tracer.schema import REPORTED_PREFIX, Phase

ID: Final = "model.mode"

PHASES: Final = (Phase.FORWARD, Phase.LOSS, Phase.GRAD)
DROPOUT: Final = "lora.dropout"

_MODES: Final[dict[float, Mode]] = {1.0: True, 0.0: False}
_WORDS: Final[dict[Mode, str]] = {
    True: "in training mode",
    False: "in evaluation mode",
    MIXED: "with some modules in evaluation mode",
}


def find(context: Context) -> list[Cause]:
    """At most one cause, for the first finding."""
    first = context.findings[0] if context.findings else None
    if first is None or Phase.parse(first.phase) not in PHASES:
        return []
    a, b = (mode_of(context, side, first.step) for side in "ab")
    dropout = {side: _dropout(context.trace(side)) for side in "ab"}
    if a is None or b is None or a == b:
        return []
    modes = {"a": a, "b": b}
    if all(dropout[side] == 0.0 for side in "ab" if modes[side] is not False):
        return []
    odd, other = ("b", "a") if modes["a"] is True or modes["b"] is False else ("a", "b")
    summary = (
        f"{odd} computes step {first.step} {_words(modes[odd], dropout[odd])}, "
        f"{other} {_words(modes[other], dropout[other])}; observed, its effect is not tested"
    )
    names = {one.name for one in context.findings if (one.step, one.phase) == (first.step, first.phase) and one.name}
    return [
        Cause(
            ID, summary, side=odd if modes[other] is True else None, step=first.step, phase=first.phase,
            names=tuple(sorted(names)), parameters={"a": a, "b": b},
        )
    ]  # fmt: skip


def mode_of(context: Context, side: str, step: int) -> Mode | None:
    """In which mode a side computed a step; None if that was not seen."""
    row = context.row(side, Phase.HPARAMS, step)
    if row is None:
        return None
    reported = row.scalar(f"{REPORTED_PREFIX}{KEY}")
    observed = context.trace(side).observed.get(KEY)
    if reported is not None:
        return _MODES.get(reported, MIXED)
    return observed if isinstance(observed, (bool, str)) else None


def _dropout(trace: Trace) -> float | None:
    """The largest rate of the adapters; None if it is not known."""
    rate = trace.observed.get(DROPOUT, trace.declared.get(DROPOUT))
    rates = [each for each in (rate if isinstance(rate, list) else [rate]) if isinstance(each, (int, float))]
    return float(max(rates)) if rates else None


def _words(mode: Mode, dropout: float | None) -> str:
    if not dropout:
        return _WORDS[mode]
    return f"{_WORDS[mode]} (dropout {dropout:g}{'' if mode is True else ' is off' if mode is False else ''})"
