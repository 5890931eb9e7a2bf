"""`init.draw`: initial parameters of the same distribution, but another random draw.

Formula: the two sides of a record are uncorrelated, their standard deviations agree and so does the shape of their
distributions, all within what chance allows for the number of elements (see `differ/causes/draws.py`).  The sides of a
record that is drawn again have nothing in common, so their squared difference is the sum of both squares.

Source: a seed that is set before the base model has consumed random numbers on one side and after it on the other, or
not at all (unsloth-zoo #674, mlx-lm #1660).  A new draw is not telling which side is right: no side is named.
"""

from __future__ import annotations

from typing import Final

from differ.causes.context import Context
from differ.causes.draws import Draws, measure
from differ.causes.records import subject, suspects
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "init.draw"


def find(context: Context) -> list[Cause]:
    """At most one cause: all records that were drawn again."""
    draws, asked = redrawn(context)
    if not draws.independent or not draws.same_scale:
        return []
    what = subject(draws.names, Phase.INIT, asked)
    verb = "is" if len(draws.names) == 1 else "are"
    summary = f"{what} {verb} another random draw of the same distribution (another seed, or set at another moment)"
    parameters = {"elements": sum(draw.count for draw in draws.records)}
    return [
        Cause(
            ID, summary, step=0, phase=Phase.INIT.label, names=draws.names, parameters=parameters, explains=draws.share
        )
    ]


def redrawn(context: Context) -> tuple[Draws, int]:
    """Initial parameters whose two sides are uncorrelated, and how many records were looked at."""
    draws, asked = Draws(), 0
    for step, phase, found in context.groups(Phase.INIT):
        for place in suspects(context, step, phase, found):
            asked += 1
            sides = context.pair(phase, step, place.name)
            draw = None if sides is None else measure(place.name, *sides)
            if draw is not None:
                draws.add(draw)
    return draws, asked
