"""Notes: what is systematic and stays within tolerance, one constant ratio in all losses or gradients of a step.

    b = c a      c = sum ab / sum aa over all records that are within tolerance    e standard error of c
    noted if     |c - 1| > 5 e   and   |c - 1| > 3e-6   and   the ratio explains at least 0.9 of the squared difference

Rounding noise has no direction: it moves c by its own standard error.  A learning rate rounded to bfloat16 (1.00136), an
auxiliary head counted with another length (1.00024, Megatron-LM #3159) are bugs that every tolerance lets pass.  Looked for
where both sides' inputs still agree: up to the first finding, and at no more than eight steps spread over those.  A note never
changes the verdict; `trace diff --fail-on note` makes it fail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from differ.causes import loss_precision
from differ.causes.constants import name_factor
from differ.causes.context import Context
from differ.causes.fit import RatioFit
from differ.result import Cause, Finding
from tracer.schema import REPORTED_PREFIX, Phase

IDS: Final = ("grad.scale", "loss.reduction", loss_precision.ID)

STANDARD_ERRORS: Final = 5.0
SMALLEST: Final = 3e-6
EXPLAINED: Final = 0.9
_MOST_STEPS: Final = 8
# Fewer numbers have no standard error worth the name.
_FEWEST: Final = 4
# Findings in these phases say nothing of the model's outputs at their own step.
_AFTER: Final = (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM, Phase.EVAL)


def find(context: Context) -> list[Cause]:
    """At most one note for the losses of all steps, one for the gradients of the first step that shows it, one for a dtype."""
    return [*_systematic(context), *loss_precision.note(context)]


def _systematic(context: Context) -> list[Cause]:
    steps = comparable_steps(context)
    if any(note.id == IDS[0] and note.explains is not None for note in context.notes):
        return _losses(context, steps)  # a judge has said it of the gradients already
    return [*_losses(context, steps), *_gradients(context, steps)]


def comparable_steps(context: Context) -> tuple[int, ...]:
    """Steps whose model outputs are judged on equal inputs: up to the first finding that bears on them."""
    first = min((_last_comparable(finding) for finding in context.findings), default=math.inf)
    return tuple(step for step in context.steps() if 0 < step <= first)


def _last_comparable(finding: Finding) -> float:
    return finding.step if Phase.parse(finding.phase) in _AFTER else finding.step - 1


def _gradients(context: Context, steps: Sequence[int]) -> list[Cause]:
    """The first of some steps at which all gradients have one ratio; says how many of them do."""
    noted: list[tuple[int, RatioFit, tuple[str, ...]]] = []
    looked_at = _spread(steps)
    for step in looked_at:
        fit = RatioFit()
        seen = []
        for name in context.differing(Phase.GRAD, step):
            both = None if name.startswith(REPORTED_PREFIX) else context.pair(Phase.GRAD, step, name)
            if both is not None:
                fit.add(*both)
                seen.append(name)
        if systematic(fit):
            noted.append((step, fit, tuple(seen)))
    if not noted or not _lasting(noted, looked_at):
        return []
    step, fit, names = noted[0]
    where = f"all gradients that differ ({len(names):,})"
    return [
        _note("grad.scale", where, context, step, Phase.GRAD, names, fit, f"{len(noted)} of {len(looked_at)} steps")
    ]


def _lasting(noted: Sequence[tuple[int, RatioFit, tuple[str, ...]]], looked_at: Sequence[int]) -> bool:
    """Whether the ratio stays: weights that drift apart scale gradients too, by another factor at every step."""
    step, first, _ = noted[0]
    deviation = abs(first.ratio - 1.0)
    alike = [
        fit for _, fit, _ in noted if abs(fit.ratio - first.ratio) <= 0.1 * deviation + STANDARD_ERRORS * fit.error
    ]
    return 2 * len(alike) > sum(1 for other in looked_at if other >= step)


def _losses(context: Context, steps: Sequence[int]) -> list[Cause]:
    """All losses of the comparable steps together: each is one number.  Losses that the judge found to be the same under
    another reduction have its factor, and that is said already.
    """
    if any(note.id == "loss.weighted" for note in context.notes):
        return []
    fit, seen = RatioFit(), []
    for step in steps:
        for number in context.micro_batches(Phase.LOSS, step):
            rows = [context.row(side, Phase.LOSS, step, number) for side in "ab"]
            if rows[0] is not None and rows[1] is not None and rows[0].view.seal == rows[1].view.seal:
                continue  # the same bits: not even their index is read
            both = context.pair(Phase.LOSS, step, "loss", number)
            if both is not None:
                fit.add(*both)
                seen.append(step)
    if not systematic(fit):
        return []
    return [_note("loss.reduction", f"all losses ({len(seen):,})", context, seen[0], Phase.LOSS, ("loss",), fit, "")]


def systematic(fit: RatioFit) -> bool:
    """Whether a ratio is more than noise."""
    if fit.count < _FEWEST or not (math.isfinite(fit.ratio) and math.isfinite(fit.error)):
        return False
    deviation = abs(fit.ratio - 1.0)
    return deviation > STANDARD_ERRORS * fit.error and deviation > SMALLEST and fit.share >= EXPLAINED


def factor_words(factor: float) -> str:
    """A factor near 1 with three significant digits of its deviation: 1.000300."""
    deviation = abs(factor - 1.0)
    digits = max(3, 2 - math.floor(math.log10(deviation))) if deviation > 0.0 else 3
    return f"{factor:.{digits}f}"


def _note(
    cause_id: str,
    where: str,
    context: Context,
    step: int,
    phase: Phase,
    names: tuple[str, ...],
    fit: RatioFit,
    times: str,
) -> Cause:
    words = factor_words(fit.ratio)
    matches = name_factor(context, step, fit.ratio, fit.error)
    more = "".join(f", {part}" for part in (times, matches) if part)
    summary = f"within tolerance but systematic: {where} are {words} times as large in b{more}"
    parameters = {
        "factor": float(words),
        "deviation": float(f"{fit.ratio - 1.0:.3g}"),
        "error": float(f"{fit.error:.2g}"),
    }
    return Cause(
        cause_id, summary, step=step, phase=phase.label, names=names, parameters=parameters, explains=fit.share
    )


def _spread(steps: Sequence[int]) -> list[int]:
    """At most eight of some steps, the first and the last among them."""
    if len(steps) <= _MOST_STEPS:
        return list(steps)
    return sorted({steps[round(i * (len(steps) - 1) / (_MOST_STEPS - 1))] for i in range(_MOST_STEPS)})
