"""`loss.shift`: one side's loss has another token as target than the next: its labels are shifted twice, or not at all.

    l[t + 1] = -log p_t(y[t + k])    l[t + 1] the token loss recorded for position t + 1, p_t of the side's own logits at t,
                                     y the labels of the batch, on which both sides agree; k = 1 is a language model's,
                                     2 is shifted twice, 0 not at all
    loss     = sum over t of -log p_t(y[t + k]) / d    where only the reduced loss was recorded: over all t whose y[t + k] is
                                     supervised, d their number or the number of supervised positions, either one times
                                     the micro-batches, or that of the step

Each side's k is found from its own logits and losses: what it leaves is at most a hundredth of the squared difference of
the sides, and no other k does that.  Undone: b's losses with a's k.  Positions count where the logits were recorded, both
sides have a loss and both targets are supervised; the reduced loss only where the logits of all targets were recorded (so
never k = 0: the last supervised position's were not), in several micro-batches, to within its rounding.

Source: labels shifted in a collator or a loop and again in the model (transformers' `labels` are unshifted;
`ForCausalLMLoss` shifts them).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from differ.causes.context import Context, Float64
from differ.causes.fit import SHOWN, Sums, explained_share
from differ.result import Cause
from tracer.dtypes import EPSILON
from tracer.schema import TOKEN_LOSS, Phase

ID: Final = "loss.shift"

SHIFTS: Final = (0, 1, 2)
LOGITS: Final = "lm_head"
LOSS: Final = "loss"
# Fewer positions can agree by chance.
_FEWEST: Final = 6
# Micro-batches whose reduced loss is looked at, of all steps, at most and at least: one alone can agree by chance.
_MOST, _LEAST = 8, 2
# A reduced loss is that of its targets to this many units in the last place.
_ULPS: Final = 64.0
# Numbers of a block of logits that is in memory at once in float64.
_BLOCK: Final = 2**21

_WORDS: Final = {0: "the token at its own place", 1: "the next token", 2: "the token two places on"}
Ints = npt.NDArray[np.int64]
# A shift, and by what the sum of its targets' losses is divided.
_Rule = tuple[int, str]


@dataclass(frozen=True, slots=True)
class _Scores:
    """-log p of the target of each shift at each recorded position, float64[n, 3]; nan where that is not supervised."""

    places: Ints
    labels: Ints
    values: Mapping[str, Float64]

    def complete(self, k: int) -> bool:
        """Whether the logits of all targets of a shift were recorded."""
        targets = self.labels[:, k:] >= 0
        recorded = np.zeros(self.labels.shape, bool)
        recorded[self.places[:, 0], self.places[:, 1]] = True
        return bool(targets.any() and recorded[:, : targets.shape[1]][targets].all())


def find(context: Context) -> list[Cause]:
    """At most one cause for each step with a finding in `loss`."""
    found = []
    for step, _, findings in context.groups(Phase.LOSS):
        names = tuple(dict.fromkeys(one.name for one in findings if one.name in (TOKEN_LOSS, LOSS)))
        if names:
            # Where there are token losses they decide.
            tokens = list(_token_losses(context, step))
            found += _by_token(step, names, tokens) if tokens else _by_reduced(context, step, names)
    return found


def _scores(context: Context, step: int, number: int) -> _Scores | None:
    """Both sides' scores in a micro-batch; None if something was not recorded, or the labels differ."""
    labels = [context.values(side, Phase.BATCH, step, "labels", number) for side in "ab"]
    places, logits = context.positions(step, number), context.pair(Phase.FORWARD, step, LOGITS, number)
    known = [each for each in labels if each is not None]
    if places is None or logits is None or not known or any(each.shape != known[0].shape for each in known):
        return None
    target = known[0].astype(np.int64)
    if target.ndim != 2 or not len(places) or logits[0].shape[:1] != (len(places),) or logits[0].ndim != 2:
        return None
    outside = (places >= target.shape).any() or target.max(initial=0) >= logits[0].shape[1]
    if outside or (known[-1] != known[0]).any():
        return None
    targets = _targets(target, places)
    return _Scores(places, target, {side: _surprise(each, targets) for side, each in zip("ab", logits, strict=True)})


def _targets(labels: Ints, places: Ints) -> Ints:
    """Label of each position under each shift, int64[n, 3]; negative where there is none."""
    padded = np.pad(labels, ((0, 0), (0, max(SHIFTS))), constant_values=-1)
    return np.stack([padded[places[:, 0], places[:, 1] + k] for k in SHIFTS], axis=1)


def _surprise(logits: Float64, targets: Ints) -> Float64:
    """-log p of the targets, nan for a negative one; the logits block by block, since a vocabulary is large."""
    found = np.full(targets.shape, math.nan)
    each = max(1, _BLOCK // max(1, logits.shape[1]))
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for start in range(0, len(logits), each):
            block, wanted = logits[start : start + each], targets[start : start + each]
            top = block.max(axis=1, keepdims=True)
            normaliser = top + np.log(np.exp(block - top).sum(axis=1, keepdims=True))
            scores = normaliser - np.take_along_axis(block, np.maximum(wanted, 0), axis=1)
            found[start : start + each] = np.where(wanted >= 0, scores, math.nan)
    return found


def _token_losses(context: Context, step: int) -> Iterator[tuple[_Scores, dict[str, Float64]]]:
    """Scores of a micro-batch and both sides' token losses at the recorded positions, nan where there is none."""
    for number in context.micro_batches(Phase.LOSS, step):
        both = context.pair(Phase.LOSS, step, TOKEN_LOSS, number)
        scores = None if both is None else _scores(context, step, number)
        if both is None or scores is None or both[0].shape != scores.labels.shape:
            continue
        inside = scores.places[:, 1] + 1 < scores.labels.shape[1]
        following = np.minimum(scores.places[:, 1] + 1, scores.labels.shape[1] - 1)
        taken = {side: one[scores.places[:, 0], following] for side, one in zip("ab", both, strict=True)}
        yield scores, {side: np.where(inside & (one != 0.0), one, math.nan) for side, one in taken.items()}


@dataclass(slots=True)
class _Tested:
    """A pair of shifts: squared difference, what b's losses with a's shift leave of it, what each side leaves of its own."""

    sums: Sums = field(default_factory=Sums)
    own: dict[str, float] = field(default_factory=lambda: {"a": 0.0, "b": 0.0})
    count: int = 0

    def add(self, scores: _Scores, losses: Mapping[str, Float64], k: tuple[int, int]) -> None:
        a, b, expected_a, expected_b = (
            losses["a"], losses["b"], scores.values["a"][:, k[0]], scores.values["b"][:, k[1]],
        )  # fmt: skip
        swapped = b - expected_b + scores.values["b"][:, k[0]]
        at = np.isfinite(a + b + expected_a + swapped)
        self.sums.add(a[at], b[at], swapped[at])
        self.own["a"] += float(np.square(a - expected_a)[at].sum())
        self.own["b"] += float(np.square(b - expected_b)[at].sum())
        self.count += int(at.sum())

    @property
    def fits(self) -> bool:
        left = [explained_share(self.sums.difference, own) for own in self.own.values()]
        return self.count >= _FEWEST and min(self.sums.share, *left) >= SHOWN


def _by_token(step: int, names: tuple[str, ...], parts: list[tuple[_Scores, dict[str, Float64]]]) -> list[Cause]:
    tested = {pair: _Tested() for pair in itertools.permutations(SHIFTS, 2)}
    for scores, losses in parts:
        for pair, one in tested.items():
            one.add(scores, losses, pair)
    fitting = [pair for pair, one in tested.items() if one.fits]
    if len(fitting) != 1:
        return []
    one = tested[fitting[0]]
    supervised = sum(int(np.isfinite(losses["a"] + losses["b"]).sum()) for _, losses in parts)
    return [_cause(step, names, fitting[0], one.sums.share, f"{one.count} of {supervised} token losses", one.count)]


def _by_reduced(context: Context, step: int, names: tuple[str, ...]) -> list[Cause]:
    """The shift under which every reduced loss that can be computed again is what was recorded, one for each side."""
    looked = list(_reduced_losses(context, step))
    if len(looked) < _LEAST:
        return []
    rules = {side: frozenset.intersection(*(one.sides[side].near for one in looked)) for side in "ab"}
    shifts = {side: {k for k, _ in rules[side]} for side in "ab"}
    common = sorted({d for _, d in rules["a"]} & {d for _, d in rules["b"]})
    if any(len(each) != 1 for each in shifts.values()) or shifts["a"] == shifts["b"] or not common:
        return []
    pair = shifts["a"].pop(), shifts["b"].pop()
    sums = Sums()
    for one in looked:
        if one.step == step:
            a, b = one.sides["a"], one.sides["b"]
            undone = b.loss - b.expected[pair[1], common[0]] + b.expected[pair[0], common[0]]
            sums += Sums((a.loss - b.loss) ** 2, (a.loss - undone) ** 2)
    if sums.share < SHOWN:
        return []
    return [_cause(step, names, pair, sums.share, f"the losses of {len(looked)} micro-batches", len(looked))]


@dataclass(frozen=True, slots=True)
class _Reduced:
    """A side's loss of a micro-batch, what it would be by shift and denominator, and which of these it is within rounding."""

    loss: float
    expected: Mapping[_Rule, float]
    near: frozenset[_Rule]


@dataclass(frozen=True, slots=True)
class _Looked:
    step: int
    sides: Mapping[str, _Reduced]


def _reduced_losses(context: Context, step: int) -> Iterator[_Looked]:
    """Both sides of each micro-batch that can be computed again, those of the step first, of as many as are looked at."""
    steps = (step, *(each for each in context.steps() if each != step))
    each = ((at, number) for at in steps for number in context.micro_batches(Phase.LOSS, at))
    for at, number in itertools.islice(each, _MOST):
        scores = _scores(context, at, number)
        shifts = [] if scores is None else [k for k in SHIFTS if scores.complete(k)]
        if scores is None or len(shifts) < 2:
            continue
        losses = {side: context.scalar(side, Phase.LOSS, at, LOSS, number) for side in "ab"}
        sides = {
            side: _reduced(context, (at, number, side), loss, _expected(context, at, scores, shifts, side))
            for side, loss in losses.items()
            if loss is not None
        }
        if len(sides) == len(losses):
            yield _Looked(at, sides)


def _reduced(context: Context, at: tuple[int, int, str], loss: float, expected: Mapping[_Rule, float]) -> _Reduced:
    step, number, side = at
    epsilon = EPSILON.get(context.dtype(side, Phase.LOSS, step, LOSS, number) or "", 0.0)
    allowed = _ULPS * epsilon * max(1.0, abs(loss))
    return _Reduced(loss, expected, frozenset(rule for rule, value in expected.items() if abs(loss - value) <= allowed))


def _expected(context: Context, step: int, scores: _Scores, shifts: list[int], side: str) -> dict[_Rule, float]:
    """The loss under each shift and each denominator."""
    numbers = context.micro_batches(Phase.LOSS, step)
    tokens = [context.scalar("a", Phase.BATCH, step, "tokens", number) or 0.0 for number in numbers]
    supervised = float((scores.labels[:, 1:] >= 0).sum())
    found: dict[_Rule, float] = {}
    for k in shifts:
        values = scores.values[side][:, k]
        counts = {"targets": float(np.isfinite(values).sum()), "supervised": supervised, "step": sum(tokens)}
        counts |= {f"{name} times micro-batches": counts[name] * len(numbers) for name in ("targets", "supervised")}
        found |= {(k, name): float(np.nansum(values)) / count for name, count in counts.items() if count > 0.0}
    return found


def _cause(step: int, names: tuple[str, ...], pair: tuple[int, int], share: float, tested: str, count: int) -> Cause:
    a, b = pair
    odd, other = ("b", "a") if b != 1 else ("a", "b")
    shifts = {"a": a, "b": b}
    summary = (
        f"{odd}'s loss takes {_WORDS[shifts[odd]]} as target, {other}'s {_WORDS[shifts[other]]} (tested on {tested})"
    )
    return Cause(
        ID, summary, side=odd if 1 in pair else None, step=step, phase=Phase.LOSS.label, names=names,
        parameters={"shift_a": a, "shift_b": b, "tested": count}, explains=share,
    )  # fmt: skip
