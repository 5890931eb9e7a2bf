"""The report of `trace verify`: the verdict, what does not follow, and one line a step.  Computes nothing but line breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from differ.reference import Departure, Measured, ReferenceSide, ReferenceStep
from scenarios.reference.rules import GRAD_RULES, LOSS_RULES

# Lines of the table; of more steps the first, the last and every one that does not follow are shown.
MOST_LINES: Final = 40


def render(measured: Measured, side: ReferenceSide) -> str:
    """The report as text, with a newline at the end."""
    lines = [headline(side), f"  trace    {measured.label}: {measured.trace}", *_why(side)]
    lines += [f"  note     {note}" for note in side.notes]
    return "\n".join([*lines, "", *_table(side.steps)]) + "\n"


def headline(side: ReferenceSide) -> str:
    """The verdict and where."""
    if side.first is not None:
        return f"DOES NOT FOLLOW the reference at {address(side.first)}"
    worst = side.worst
    steps = "1 step" if len(side.steps) == 1 else f"{len(side.steps)} steps"
    return (
        f"FOLLOWS the reference: {steps}, {side.records:,} records; worst gradient {worst.worst:.2g} "
        f"(tolerance {worst.tolerance:.2g}) at step {worst.step}"
    )


def address(found: Departure) -> str:
    """`step 1, loss, micro-batch 0, loss`."""
    micro_batch = "" if found.micro_batch is None else f", micro-batch {found.micro_batch}"
    return f"step {found.step}, {found.phase}{micro_batch}, {found.name}"


def _why(side: ReferenceSide) -> Iterator[str]:
    if side.first is not None:
        found = side.first
        detail = f"; {found.detail}" if found.detail else ""
        yield f"  found    relative error {found.error:.3g} (tolerance {found.tolerance:.3g}){detail}"
        if side.departures > 1:
            yield f"  also     {side.departures - 1:,} more of {side.records:,} records do not follow"
    checked = f" ({side.frozen:,} frozen weights are the same to the bit)" if side.frozen else ""
    yield f"  by       {side.engine}, {side.dtype}, base {side.base}{checked}"
    yield f"  rules    loss: {LOSS_RULES[side.loss_rule]}"
    yield f"           gradient: {GRAD_RULES[side.grad_rule]}"


def _table(steps: Sequence[ReferenceStep]) -> Iterator[str]:
    yield f"{'step':>6}  {'loss':>8}  {'grad':>8}  {'worst':>8}  {'allowed':>8}  tensor"
    shown = _shown(steps)
    for step in steps:
        if step in shown:
            loss = "·" if step.loss is None else f"{step.loss:.1e}"
            mark = "" if step.follows else "  does not follow"
            yield (
                f"{step.step:>6}  {loss:>8}  {step.grad:>8.1e}  {step.worst:>8.1e}  {step.tolerance:>8.1e}  "
                f"{step.name}{mark}"
            )
    if len(shown) < len(steps):
        yield f"        … {len(steps) - len(shown):,} steps that are like these"


def _shown(steps: Sequence[ReferenceStep]) -> list[ReferenceStep]:
    if len(steps) <= MOST_LINES:
        return list(steps)
    half = MOST_LINES // 2
    chosen = [step for step in steps[half:-half] if not step.follows][:MOST_LINES]
    return [*steps[:half], *chosen, *steps[-half:]]
