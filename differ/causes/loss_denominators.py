"""What a loss may be divided by: the numbers that the batch's records give, alone or times the number of micro-batches.

    l = S / d    S the sum over the supervised positions of a micro-batch, d one of
                 the supervised positions of the micro-batch (the usual mean), of the step, or their mean; all positions,
                 those that are predicted (one fewer a row), either one without padding; rows; 1 (a sum)
                 any of these times the number of micro-batches

Two denominators explain a pair of losses if l_b / l_a = d_a / d_b in every micro-batch, to within the losses' rounding.
`constants` says how many numbers they have beside the usual mean's: an explanation by fewer is preferred.  Two names of one
number (all predicted positions where all are supervised, the step's where the micro-batches have as many) count once, under
the usual name; two numbers that happen to be equal are two readings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from differ.causes.context import Context
from tracer.schema import Phase

SUPERVISED: Final = "the supervised positions"
STEP: Final = "the step's supervised positions"
MEAN: Final = "the mean of the micro-batches' supervised positions"
POSITIONS: Final = "all positions"
PREDICTED: Final = "all predicted positions"
UNPADDED: Final = "the positions that are not padding"
UNPADDED_PREDICTED: Final = "the predicted positions that are not padding"
ROWS: Final = "the rows of the batch"
NOTHING: Final = "nothing (a sum)"
# Denominators of a loss that counts other positions than the supervised ones.
OTHERS: Final = (POSITIONS, PREDICTED, UNPADDED, UNPADDED_PREDICTED, ROWS, NOTHING)

# Two losses are one up to their denominators to this many units in the last place, and at most to this relative error.
_ULPS: Final = 64.0
_WORST: Final = 1e-4


@dataclass(frozen=True, slots=True)
class Denominator:
    """d by micro-batch; `micro`: the number of micro-batches that is a factor of it, 1 if it is not."""

    base: str
    micro: int
    values: Mapping[int, float]

    @property
    def constants(self) -> int:
        """How many numbers it has beside the usual mean's."""
        return (self.base != SUPERVISED) + (self.micro > 1)

    @property
    def words(self) -> str:
        """`all positions (48) and the number of micro-batches (2)`."""
        micro = f"the number of micro-batches ({self.micro})" if self.micro > 1 else ""
        if self.base == NOTHING:
            return f"{micro} alone" if micro else NOTHING
        counts = list(dict.fromkeys(f"{value / self.micro:g}" for value in self.values.values()))
        shown = ", ".join(counts[:3]) + ", …" * (len(counts) > 3)
        return f"{self.base} ({shown})" + (f" and {micro}" if micro else "")


@dataclass(frozen=True, slots=True)
class Explained:
    """Denominators of both sides; `factors` are l_b / l_a by micro-batch."""

    a: Denominator
    b: Denominator
    factors: Mapping[int, float]

    @property
    def equal(self) -> bool:
        """Whether it is one factor in every micro-batch."""
        found = list(self.factors.values())
        return all(math.isclose(factor, found[0], rel_tol=1e-9) for factor in found)

    @property
    def constants(self) -> int:
        """How many numbers it takes."""
        return self.a.constants + self.b.constants

    @property
    def side(self) -> str | None:
        """The side that counts other positions than the supervised ones, if that is one side."""
        odd = [side for side, one in (("a", self.a), ("b", self.b)) if one.base in OTHERS]
        return odd[0] if len(odd) == 1 else None

    @property
    def words(self) -> str:
        """`b divides the loss by all positions (48), a by the supervised positions (24)`."""
        first, second = ("a", "b") if self.side == "a" else ("b", "a")
        each = {"a": self.a.words, "b": self.b.words}
        return f"{first} divides the loss by {each[first]}, {second} by {each[second]}"


def explanations(
    context: Context, step: int, losses: Mapping[str, Mapping[int, float]], epsilon: float
) -> list[Explained]:
    """Pairs of denominators, of at most two numbers, under which the two sides' losses agree in every micro-batch.

    `losses` are those of each side by micro-batch, not 0; `epsilon` is that of their dtype.
    """
    known = denominators(context, step, list(losses["a"]))
    found = []
    for a in known:
        for b in known:
            pair = Explained(a, b, {n: a.values[n] / b.values[n] for n in a.values})
            # Micro-batches on both sides cancel; a factor of 1 everywhere is no difference.
            if a is b or pair.constants > 2 or min(a.micro, b.micro) > 1 or set(pair.factors.values()) == {1.0}:
                continue
            if _agree(losses, pair.factors, epsilon):
                found.append(pair)
    return found


def _agree(losses: Mapping[str, Mapping[int, float]], factors: Mapping[int, float], epsilon: float) -> bool:
    for n, factor in factors.items():
        a, b = losses["a"][n], losses["b"][n]
        # Rounding noise of the logits does not get smaller with the loss.
        allowed = min(_WORST, _ULPS * epsilon / min(1.0, max(abs(a), abs(b))))
        if abs(b / (a * factor) - 1.0) > allowed:
            return False
    return True


def denominators(context: Context, step: int, numbers: list[int]) -> list[Denominator]:
    """Every denominator that the records of the step's batch give; empty if the supervised positions are not known."""
    kept: dict[str, Mapping[int, float]] = {}
    for base, values in counts(context, step, numbers).items():
        alike = (SUPERVISED, MEAN) if base in (STEP, MEAN) else (SUPERVISED, *OTHERS)
        # The step's count of equal micro-batches is one of them times their number.
        even = base == STEP and len(set(kept[SUPERVISED].values())) == 1
        chance = base in (ROWS, NOTHING)
        if chance or not (even or any(kept[name] == values for name in alike if name in kept)):
            kept[base] = values
    return [
        Denominator(base, micro, {n: value * micro for n, value in values.items()})
        for base, values in kept.items()
        for micro in dict.fromkeys((1, len(numbers)))
    ]


def counts(context: Context, step: int, numbers: list[int]) -> dict[str, Mapping[int, float]]:
    """What there is to divide by, by micro-batch, the usual mean's first; empty if that is not known on both sides."""
    return {base: values for base, values in _counts(context, step, numbers) if min(values.values()) > 0.0}


def _counts(context: Context, step: int, numbers: list[int]) -> Iterator[tuple[str, dict[int, float]]]:
    tokens = {n: [context.scalar(side, Phase.BATCH, step, "tokens", n) for side in "ab"] for n in numbers}
    if not numbers or any(a != b or not a for a, b in tokens.values()):
        return
    known = {n: float(a or 0.0) for n, (a, _) in tokens.items()}
    yield SUPERVISED, known
    yield STEP, dict.fromkeys(numbers, sum(known.values()))
    yield MEAN, dict.fromkeys(numbers, sum(known.values()) / len(numbers))
    sizes = {n: size for n in numbers if (size := _shape(context, step, n)) is not None}
    if len(sizes) == len(numbers):
        yield POSITIONS, {n: float(rows * length) for n, (rows, length) in sizes.items()}
        yield PREDICTED, {n: float(rows * (length - 1)) for n, (rows, length) in sizes.items()}
        yield from _unpadded(context, step, numbers)
        yield ROWS, {n: float(rows) for n, (rows, _) in sizes.items()}
    yield NOTHING, dict.fromkeys(numbers, 1.0)


def _unpadded(context: Context, step: int, numbers: list[int]) -> Iterator[tuple[str, dict[int, float]]]:
    masks = {}
    for n in numbers:
        both = (context.values(side, Phase.BATCH, step, "attention_mask", n) for side in "ab")
        mask = next((each for each in both if each is not None), None)
        if mask is None or mask.ndim != 2:
            return
        masks[n] = mask != 0.0
    yield UNPADDED, {n: float(mask.sum()) for n, mask in masks.items()}
    yield UNPADDED_PREDICTED, {n: float(mask[:, 1:].sum()) for n, mask in masks.items()}


def _shape(context: Context, step: int, number: int) -> tuple[int, int] | None:
    row = context.row("a", Phase.BATCH, step, number)
    found = row.shape("input_ids") if row is not None and "input_ids" in row.positions else ()
    return (found[0], found[1]) if len(found) == 2 else None
