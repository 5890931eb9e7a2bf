"""Put one question to every record that a finding may concern, and gather those that answer alike into one cause.

A question is a function of both sides of one record (float64, one shape) that returns what it fitted and the sums before
and after undoing it, or None.  Only records of which it explains 0.99 count, so a cause names exactly those it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from differ.causes.context import Context
from differ.causes.fit import SHOWN, Float64, Sums
from differ.inputs import LORA_SCALE
from differ.result import Cause, Finding
from tracer.schema import REPORTED_PREFIX, RNG_PREFIX, WHOLE_STEP, Phase

K = TypeVar("K", bound=Hashable)

# Phases that hold tensors of floats.
TENSORS: Final = (Phase.INIT, Phase.FORWARD, Phase.GRAD, Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)


@dataclass(frozen=True, slots=True)
class Place:
    """Address of one record on both sides."""

    phase: Phase
    step: int
    micro_batch: int
    name: str


@dataclass(frozen=True, slots=True)
class Answer(Generic[K]):
    """What a question found in one record; answers with equal keys go together, whatever they `fitted`."""

    key: K
    sums: Sums
    fitted: float = 0.0


@dataclass(slots=True)
class Group(Generic[K]):
    """Records of one row that answered alike; `of` is how many records of the row were asked."""

    step: int
    phase: Phase
    key: K
    of: int
    names: list[str] = field(default_factory=list)
    fits: list[float] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)

    @property
    def fitted(self) -> float:
        """Mean of what was fitted in each record."""
        return sum(self.fits) / len(self.fits)

    @property
    def subject(self) -> str:
        """`model.x.weight`, `6 tensors of grad`, `all 6 tensors of grad that differ`."""
        return subject(self.names, self.phase, self.of)


Question = Callable[[Place, Float64, Float64], Answer[K] | None]


def ask(
    context: Context, question: Question[K], phases: Sequence[Phase] = TENSORS, *, any_shape: bool = False
) -> list[Group[K]]:
    """Put a question to every record under suspicion; groups in causal order, names sorted.

    Both sides have one shape, unless the question is one for `any_shape`.
    """
    groups: dict[tuple[int, Phase, K], Group[K]] = {}
    for step, phase, found in context.groups(*phases):
        places = list(suspects(context, step, phase, found))
        for place in places:
            a, b = (context.values(side, phase, step, place.name, place.micro_batch) for side in "ab")
            if a is None or b is None or not (any_shape or a.shape == b.shape):
                continue
            answer = question(place, a, b)
            if answer is None or answer.sums.share < SHOWN:
                continue
            group = groups.setdefault((step, phase, answer.key), Group(step, phase, answer.key, len(places)))
            group.names.append(place.name)
            group.fits.append(answer.fitted)
            group.sums += answer.sums
    for group in groups.values():
        group.names = sorted(set(group.names))
    return list(groups.values())


def found(
    context: Context, cause_id: str, question: Question[None], words: str, *, any_shape: bool = False
) -> list[Cause]:
    """One cause for every row with records that answer; `words` is what they are: `negated: b is -a`."""
    causes = []
    for group in ask(context, question, any_shape=any_shape):
        summary = f"{group.subject} {'is' if len(group.names) == 1 else 'are'} {words}"
        causes.append(
            Cause(
                cause_id, summary, step=group.step, phase=group.phase.label, names=tuple(group.names), parameters={},
                explains=group.sums.share,
            )
        )  # fmt: skip
    return causes


def suspects(context: Context, step: int, phase: Phase, found: Sequence[Finding]) -> Iterator[Place]:
    """Records that the findings of one step and phase may concern; shown-only records and LoRA scales are left out."""
    for micro_batch in dict.fromkeys(WHOLE_STEP if f.micro_batch is None else f.micro_batch for f in found):
        for name in context.suspects(phase, step, micro_batch):
            if not name.startswith((RNG_PREFIX, REPORTED_PREFIX)) and not name.endswith(LORA_SCALE):
                yield Place(phase, step, micro_batch, name)


def subject(names: Sequence[str], phase: Phase, of: int) -> str:
    """What a sentence is about: one record by its name, several by their number."""
    if len(names) == 1:
        return names[0]
    every = f"all {len(names):,}" if len(names) == of else f"{len(names):,}"
    return f"{every} tensors of {phase.label} that differ" if len(names) == of else f"{every} tensors of {phase.label}"
