"""`init.scale`: initial parameters drawn at another scale: the same draw times a constant, or another, wider draw.

Formulas: same draw       b = c a, one c for all records, by least squares; the share is that of the squared difference
          another draw    uncorrelated as for `init.draw`, and std(b) / std(a) = c in every record, more than five
                          standard errors away from 1

Source: initialisers that differ in their bound: PEFT draws lora_A from U(-1/sqrt(in), 1/sqrt(in)) (kaiming_uniform with
a = sqrt(5)), others use sqrt(3) times that, or a normal distribution.  No side is named: nothing says which one is right.
"""

from __future__ import annotations

import math
from typing import Final

from differ.causes.context import Context
from differ.causes.fit import SHOWN, RatioFit
from differ.causes.init_draw import redrawn
from differ.causes.records import subject, suspects
from differ.causes.words import number
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "init.scale"

# Ratios that are this close belong to one effect.
CLOSE: Final = 1e-3


def find(context: Context) -> list[Cause]:
    """One cause for every constant."""
    return [*_same_draw(context), *_other_draw(context)]


def _same_draw(context: Context) -> list[Cause]:
    fits: list[tuple[str, RatioFit]] = []
    asked = 0
    for step, phase, found in context.groups(Phase.INIT):
        for place in suspects(context, step, phase, found):
            asked += 1
            sides = context.pair(phase, step, place.name)
            if sides is None or sides[0].size < 2:
                continue
            fit = RatioFit()
            fit.add(*sides)
            if fit.share >= SHOWN and fit.bb > 0.0:
                fits.append((place.name, fit))
    return [_cause(names, fit, asked) for names, fit in _clusters(fits)]


def _clusters(fits: list[tuple[str, RatioFit]]) -> list[tuple[tuple[str, ...], RatioFit]]:
    """Records with one ratio together, refitted."""
    clusters: list[tuple[list[str], RatioFit]] = []
    for name, fit in sorted(fits, key=lambda item: item[1].ratio):
        if clusters and abs(fit.ratio / clusters[-1][1].ratio - 1.0) <= CLOSE:
            clusters[-1][0].append(name)
            together = clusters[-1][1]
            together += fit
        else:
            clusters.append(([name], fit))
    return [(tuple(sorted(names)), fit) for names, fit in clusters]


def _cause(names: tuple[str, ...], fit: RatioFit, asked: int) -> Cause:
    summary = f"{subject(names, Phase.INIT, asked)}: b is {number(fit.ratio)} times a, the same draw at another scale"
    parameters = {"ratio": fit.ratio, "draw": "same"}
    return Cause(ID, summary, step=0, phase=Phase.INIT.label, names=names, parameters=parameters, explains=fit.share)


def _other_draw(context: Context) -> list[Cause]:
    draws, asked = redrawn(context)
    if not draws.independent or draws.same_scale:
        return []
    mean, error = draws.scale
    ratio = math.exp(mean)
    what = subject(draws.names, Phase.INIT, asked)
    summary = f"{what}: b is another random draw, its spread {number(ratio, 3)} times a's"
    parameters = {"ratio": ratio, "error": ratio * error, "draw": "other"}
    return [
        Cause(
            ID, summary, step=0, phase=Phase.INIT.label, names=draws.names, parameters=parameters, explains=draws.share
        )
    ]
