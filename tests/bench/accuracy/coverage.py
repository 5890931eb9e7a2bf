"""What is planted of each cause: how strongly, when, and in how much of the model; and what is not, with the reason.

Counted from the table of faults and the registry of causes, never from a result, so that a cause which is registered
and not planted is found by a test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from differ.causes import ids
from tests.bench.accuracy.fault import EVERY, ONE, SEVERAL, Fault

# Faults up to this step are early ones; step 0 is the start.
EARLY: Final = 2
FORMS, EARLY_STEPS, LATE_STEPS, ONE_NAME, MANY_NAMES = "two forms", "early", "late", "one", "all"
NEEDED: Final = (FORMS, EARLY_STEPS, LATE_STEPS, ONE_NAME, MANY_NAMES)

_START: Final = "it is about what a run starts from"
_WHOLE: Final = "it belongs to the step, not to a parameter"
_GROUP: Final = "a setting of all parameters"
_ALL_GRADIENTS: Final = "it acts on all gradients at once"
# Cause -> what is not planted of it -> why.
EXEMPT: Final[dict[str, dict[str, str]]] = {
    "init.names": {LATE_STEPS: _START, ONE_NAME: "parameters are left out by layer or by target"},
    "init.swapped": {
        FORMS: "there is one way to swap two",
        LATE_STEPS: _START,
        ONE_NAME: "a swap takes two",
    },
    "init.frozen": {LATE_STEPS: _START},
    "init.scale": {LATE_STEPS: _START},
    "init.draw": {LATE_STEPS: _START},
    "lora.scale": {LATE_STEPS: _START, ONE_NAME: "one setting for all adapters"},
    "schedule.lr": {ONE_NAME: _GROUP, MANY_NAMES: _GROUP},
    **{
        cause: {ONE_NAME: _WHOLE, MANY_NAMES: _WHOLE}
        for cause in (
            *(f"batch.{kind}" for kind in ("shift", "padding", "mask", "order", "positions")),
            *("loss.shift", "loss.precision", "loss.reduction", "config.differs"),
        )
    },
    "sign": {FORMS: "there is one way to change it"},
    "grad.missing": {FORMS: "there is one way to be missing"},
    "grad.zero": {FORMS: "there is one zero"},
    "layout.transpose": {FORMS: "there is one other order of two axes"},
    "grad.mean_of_means": {ONE_NAME: _ALL_GRADIENTS},
    "clip.value": {ONE_NAME: _ALL_GRADIENTS},
    "clip.tensor": {ONE_NAME: _ALL_GRADIENTS},
    "clip.norm": {ONE_NAME: _ALL_GRADIENTS},
    "clip.none": {ONE_NAME: _ALL_GRADIENTS},
    "optimizer.state_reset": {FORMS: "there is one way to begin again"},
    "optimizer.groups": {
        LATE_STEPS: "an optimizer is given its groups before the first step",
        ONE_NAME: _WHOLE,
        MANY_NAMES: _WHOLE,
    },
    "optimizer.unheld": {LATE_STEPS: "an optimizer is given its parameters before the first step"},
    "model.mode": {FORMS: "there is one other mode", ONE_NAME: "a mode is that of the whole model"},
    "optimizer.rule": {LATE_STEPS: "an optimizer is chosen before the first step", ONE_NAME: _GROUP},
    "optimizer.betas": {ONE_NAME: _GROUP},
    "optimizer.bias_correction": {ONE_NAME: _GROUP},
    "optimizer.eps": {ONE_NAME: _GROUP},
}


@dataclass(frozen=True)
class Cover:
    """The faults planted for one cause, counted."""

    cause: str
    faults: int
    forms: int
    early: int
    late: int
    one: int
    several: int
    every: int

    @property
    def gaps(self) -> tuple[str, ...]:
        """What is not planted of it."""
        held = (self.forms >= 2, self.early > 0, self.late > 0, self.one > 0, self.every + self.several > 0)
        return tuple(what for what, is_held in zip(NEEDED, held, strict=True) if not is_held)


def covers(faults: Sequence[Fault], causes: Sequence[str] | None = None) -> list[Cover]:
    """One for each registered cause, in order of registration; `causes`: others than those registered."""
    found = []
    for cause in ids() if causes is None else causes:
        own = [fault for fault in faults if fault.family == cause]
        late = sum(fault.step > EARLY for fault in own)
        scopes = [fault.scope for fault in own]
        counts = (scopes.count(ONE), scopes.count(SEVERAL), scopes.count(EVERY))
        found.append(Cover(cause, len(own), len({fault.form for fault in own}), len(own) - late, late, *counts))
    return found


def unexplained(faults: Sequence[Fault], causes: Sequence[str] | None = None) -> list[str]:
    """What is not planted and has no reason not to be: `cause: what`.  Of a cause without any fault, all of it."""
    return [
        f"{cover.cause}: {gap}"
        for cover in covers(faults, causes)
        for gap in (cover.gaps if cover.faults else ("not planted",))
        if gap not in EXEMPT.get(cover.cause, {})
    ]


def table(faults: Sequence[Fault]) -> Iterator[str]:
    """The page's section."""
    yield "| cause | faults | strengths and forms | steps 0–2 | steps 3–5 | one | several | all |"
    yield "|---|---|---|---|---|---|---|---|"
    reasons: dict[tuple[str, str], list[str]] = {}
    for cover in covers(faults):
        given = EXEMPT.get(cover.cause, {})
        for reason in dict.fromkeys(given.get(gap, "no reason") for gap in cover.gaps):
            gaps = " or ".join(gap for gap in cover.gaps if given.get(gap, "no reason") == reason)
            reasons.setdefault((gaps, reason), []).append(f"`{cover.cause}`")
        cells = (cover.faults, cover.forms, cover.early, cover.late, cover.one, cover.several, cover.every)
        yield f"| `{cover.cause}` | " + " | ".join(str(cell) if cell else "–" for cell in cells) + " |"
    yield ""
    yield (
        "Every registered cause. A form is what is planted and how strongly, whatever the step and the framework; *one*, "
        "*several*, *all*: parameters or modules that it is planted in."
    )
    yield ""
    yield "Not planted, and why:"
    yield ""
    for (gaps, reason), names in reasons.items():
        yield f"* {gaps}: {', '.join(names)}; {reason}."
