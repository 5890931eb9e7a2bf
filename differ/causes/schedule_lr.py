"""`schedule.lr`: the learning rate follows another schedule.

Formulas, over the steps t that both sides recorded, tried in this order:

    ratio        lr_b(t) = c lr_a(t), from the first step that differs on
    no warm-up   lr_b(t) = max lr_a up to the step w to which lr_a rises, to reach it there, and lr_a(t) from there on
    offset       lr_b(t) = lr_a(t + k), k an integer
    advanced     lr_b(t) = lr_a(1 + k (t - 1)), k >= 0: the scheduler steps k times a step (0: it never steps), or
                 lr_b(t) = lr_a(k t) where the scheduler counts from 1
    constant     lr_b(t) = one value, where lr_a changes
    from a step  an offset or a constant, from the first step that differs on

The same with a and b exchanged.  A rate that stays at its peak after the warm-up is also that rate w steps ahead, and one that
advances w times a step: those two say nothing about the first w steps of the other side, so the warm-up comes before them.  The
share is that of the squared difference of the two series, over the steps for which the formula says something; at least two
of them differ (for a ratio and a warm-up one is enough).

Source: schedulers stepped once per process or per micro-batch (accelerate #963, #2926, transformers #24088), warm-up left
out (UniRL #223), a schedule that is resumed off by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Float64, explained_share
from differ.causes.words import count, number
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "schedule.lr"

SUFFIX: Final = ".lr"
# A formula has to give every rate to this relative error: hyper-parameters may be held as float32.
CLOSE: Final = 1e-6
MOST_ADVANCED: Final = 64

Series = Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Shape:
    """How one side's series follows from the other's: a word, its parameters, the sentence without the names."""

    word: str
    parameters: tuple[tuple[str, float], ...]
    side: str | None
    sentence: str
    share: float


def find(context: Context) -> list[Cause]:
    """One cause for every kind of difference; groups of parameters with the same one share it."""
    names = [f.name for f in context.findings_in(Phase.HPARAMS) if f.name is not None and f.name.endswith(SUFFIX)]
    causes: dict[tuple[object, ...], Cause] = {}
    for name in names:
        a, b = (_series(context, side, name) for side in "ab")
        steps = [t for t in sorted(a) if t in b]
        first = next((t for t in steps if _apart(a[t], b[t])), None)
        shape = None if first is None else _fit(a, b, steps)
        if shape is None:
            continue
        key = (first, shape.word, shape.parameters, shape.side)
        names_here = (*(causes[key].names if key in causes else ()), name)
        parameters = {"form": shape.word, **dict(shape.parameters)}
        causes[key] = Cause(
            ID,
            shape.sentence,
            shape.side,
            first,
            Phase.HPARAMS.label,
            tuple(sorted(names_here)),
            parameters,
            shape.share,
        )
    return list(causes.values())


def _series(context: Context, side: str, name: str) -> dict[int, float]:
    steps = [step for step in context.trace(side).steps if step > 0]
    found = {step: context.scalar(side, Phase.HPARAMS, step, name) for step in steps}
    return {step: value for step, value in found.items() if value is not None}


def _fit(a: Series, b: Series, steps: list[int]) -> Shape | None:
    """The first formula that gives one side from the other."""
    both = (("b", "a", b, a), ("a", "b", a, b))
    tries: list[Iterator[Shape]] = [
        _ratio(a, b, steps),
        *(_no_warmup(*sides, steps) for sides in both),
        _offset(*both[0], steps),  # lr_a(t) = lr_b(t - k) for all t says the same
        *(rule(*sides, steps) for rule in (_advanced, _constant) for sides in both),
    ]
    return next((shape for tried in tries for shape in tried), None) or _later(a, b, steps)


def _later(a: Series, b: Series, steps: list[int]) -> Shape | None:
    """A schedule that is another one from some step on: what it says holds of the steps from there."""
    first = next(t for t in steps if _apart(a[t], b[t]))
    later = [t for t in steps if t >= first]
    if len(later) == len(steps):
        return None
    both = (("b", "a", b, a), ("a", "b", a, b))
    found = next((shape for rule in (_offset, _constant) for sides in both for shape in rule(*sides, later)), None)
    if found is None:
        return None
    parameters = (*found.parameters, ("from_step", first))
    return replace(found, parameters=parameters, sentence=f"{found.sentence} from step {first} on")


def _ratio(a: Series, b: Series, steps: list[int]) -> Iterator[Shape]:
    first = next(t for t in steps if _apart(a[t], b[t]))
    later = [t for t in steps if t >= first]
    x, y = np.array([a[t] for t in later]), np.array([b[t] for t in later])
    if not x.any() or not y.any():
        return
    c = float(x @ y / (x @ x))
    share = _share(y, x, c * x)
    if share is None:
        return
    since = "" if first == steps[0] else f" from step {first} on"
    parameters = (("ratio", _tidy(c)),) if first == steps[0] else (("ratio", _tidy(c)), ("from_step", first))
    yield Shape("ratio", parameters, None, f"b's learning rate is {number(c)} times a's{since}", share)


def _offset(mine: str, other: str, y: Series, x: Series, steps: list[int]) -> Iterator[Shape]:
    for k in sorted(range(-len(x) + 2, len(x) - 1), key=lambda k: (abs(k), k)):
        share = _compare(y, x, steps, lambda t, k=k: x.get(t + k)) if k else None  # type: ignore[misc]
        if share is not None:
            where = "ahead of" if k > 0 else "behind"
            sentence = f"{mine}'s learning rate is {count(abs(k), 'step')} {where} {other}'s"
            yield Shape("offset", (("steps", k if mine == "b" else -k),), None, sentence, share)


def _advanced(mine: str, other: str, y: Series, x: Series, steps: list[int]) -> Iterator[Shape]:
    for k in range(MOST_ADVANCED + 1):
        for counts_from in (1, 0):
            if k == 1 or (k == 0 and counts_from == 0):
                continue
            share = _compare(y, x, steps, lambda t, k=k, c=counts_from: x.get(c + k * (t - c)))  # type: ignore[misc]
            if share is None:
                continue
            how_often = "never advances its learning rate" if k == 0 else f"advances its learning rate {k} times a step"
            yield Shape("advanced", (("times", k),), mine, f"{mine} {how_often}; {other} does so once", share)


def _no_warmup(mine: str, other: str, y: Series, x: Series, steps: list[int]) -> Iterator[Shape]:
    peak = max(x.values())
    reached = min(t for t, value in x.items() if not _apart(value, peak))
    before = [x[t] for t in sorted(x) if t <= reached]
    if len(before) < 2 or any(later <= earlier for earlier, later in pairwise(before)):
        return
    share = _compare(y, x, steps, lambda t: peak if t <= reached else x[t], fewest=1)
    if share is not None:
        sentence = f"{mine} has no warm-up: it starts at {number(peak)}, which {other} reaches at step {reached}"
        yield Shape("no_warmup", (("steps", reached), ("peak", _tidy(peak))), mine, sentence, share)


def _constant(mine: str, other: str, y: Series, x: Series, steps: list[int]) -> Iterator[Shape]:
    values = [y[t] for t in steps]
    changes = any(_apart(x[t], x[steps[0]]) for t in steps)
    if len(steps) < 3 or not changes or any(_apart(value, values[0]) for value in values):
        return
    share = _compare(y, x, steps, dict.fromkeys(steps, values[0]).get)
    if share is not None:
        theirs = f"{number(min(x[t] for t in steps))} to {number(max(x[t] for t in steps))}"
        sentence = f"{mine} keeps its learning rate at {number(values[0])}; {other}'s changes ({theirs})"
        yield Shape("constant", (("value", _tidy(values[0])),), mine, sentence, share)


def _compare(
    y: Series, x: Series, steps: list[int], predict: Callable[[int], float | None], *, fewest: int = 2
) -> float | None:
    """Share that a prediction of y explains; None if it misses a rate or speaks of fewer steps that differ."""
    known = [(t, value) for t in steps if (value := predict(t)) is not None]
    if sum(_apart(x[t], y[t]) for t, _ in known) < fewest:
        return None
    predicted = np.array([value for _, value in known])
    return _share(np.array([y[t] for t, _ in known]), np.array([x[t] for t, _ in known]), predicted)


def _share(y: Float64, x: Float64, predicted: Float64) -> float | None:
    if (np.abs(y - predicted) > CLOSE * np.maximum(np.abs(y), np.abs(predicted))).any():
        return None
    share = explained_share(float(((y - x) ** 2).sum()), float(((y - predicted) ** 2).sum()))
    return share if share >= SHOWN else None


def _apart(x: float, y: float) -> bool:
    return abs(x - y) > CLOSE * max(abs(x), abs(y))


def _tidy(value: float) -> float:
    """Without the digits that float32 makes up."""
    return float(f"{value:.7g}")
