"""What the reference says of one record's two sides: whether their difference is news, and which side is wrong.

Each side is held against the reference on its own inputs, so unequal inputs do not matter.  Where both follow it, under one
reduction, whatever they differ by was in their inputs.  A gradient whose own loss does not follow, and was found not to, is a
consequence of that, and so is a loss behind a module whose output was found to differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from differ.reference import Measured, MeasuredStep, References, allowed, error_of, losses_follow, same_reduction
from differ.session import RowPair, Session
from tracer.schema import Phase


@dataclass(frozen=True, slots=True)
class Teacher:
    """A verdict on one record.

    `news`: a side does not follow, and nothing before explains it, or the two follow different reductions.  `excused`: what the
    sides differ by is no divergence of its own.  `error` and `tolerance` are those of the side that is furthest off.
    """

    news: bool
    excused: bool
    error: float
    tolerance: float
    detail: str


@dataclass(frozen=True, slots=True)
class _Side:
    letter: str
    error: float
    tolerance: float
    consequence: bool

    @property
    def follows(self) -> bool:
        return self.error <= self.tolerance

    @property
    def words(self) -> str:
        said = "follows" if self.follows else "does not follow"
        return f"{self.letter} {said} the reference (error {self.error:.3g})"


def teacher(session: Session, pair: RowPair, name: str) -> Teacher | None:
    """What the reference says of a record; None where there is none, or it did not recompute this record."""
    references = session.options.reference
    if references is None:
        return None
    sides = {}
    for letter, measured in (("a", references.a), ("b", references.b)):
        step = measured.at(pair.step)
        side = None if step is None else _side(session, pair, name, letter, measured, step)
        if side is None:
            return None
        sides[letter] = side
    return _verdict(pair, sides, references)


def _side(
    session: Session, pair: RowPair, name: str, letter: str, measured: Measured, step: MeasuredStep
) -> _Side | None:
    error = error_of(step, pair.phase, pair.micro_batch, name)
    if error is None:
        return None
    limit = allowed(session.policy, measured, step, pair.phase, name)
    # Only a loss that was found explains: one that both sides have to the bit is wrong on both, and no finding.
    found = Phase.LOSS in session.diverged_at
    earlier = pair.phase is Phase.GRAD and found and not losses_follow(session.policy, measured, step)
    # A module's output that differs was found as such: what is made of it is no news.
    consequence = earlier or Phase.FORWARD in session.diverged_at
    return _Side(letter, error, limit, consequence)


def _verdict(pair: RowPair, sides: Mapping[str, _Side], references: References) -> Teacher:
    wrong = [side for side in sides.values() if not side.follows]
    detail = "; ".join(side.words for side in sorted(sides.values(), key=lambda side: side.follows))
    worst = max(sides.values(), key=lambda side: side.error / side.tolerance if side.tolerance > 0.0 else side.error)
    other = "" if wrong or pair.phase is not Phase.GRAD else _reductions(pair.step, references)
    if other:
        detail = other
    news = bool(other) or any(not side.consequence for side in wrong)
    # Losses under two reductions of the same numbers are excused, or not, by the judge of losses.
    excused = not wrong and not other and (pair.phase is not Phase.LOSS or _one_rule(pair.step, references))
    return Teacher(news, excused or (bool(wrong) and not news), worst.error, worst.tolerance, detail)


def _reductions(step: int, references: References) -> str:
    """Both sides follow, each under a reduction of its own: said in a sentence, empty if the reductions are the same."""
    a, b = references.a.at(step), references.b.at(step)
    if a is None or b is None or same_reduction(a, b):
        return ""
    return f"each side follows the reference, a with the {a.grad_rule} of the gradients, b with the {b.grad_rule}"


def _one_rule(step: int, references: References) -> bool:
    a, b = references.a.at(step), references.b.at(step)
    if a is None or b is None or a.loss_rule == b.loss_rule:
        return True
    # Of one micro-batch all means are the same, and only the sum is not.
    return len(a.losses) == 1 == len(b.losses) and "sum" not in (a.loss_rule, b.loss_rule)
