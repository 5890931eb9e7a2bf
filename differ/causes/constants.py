"""Name a fitted factor: which number of the two runs it is, if any.

    candidates   micro-batches, processes, LoRA rank, alpha and alpha / rank, supervised positions and rows of a batch, and
                 the ratio of a setting that both sides declare or show
    matches      |c / n - 1| <= 1e-4, or the factor's own standard error times 5 where that is larger

A factor is never made to match: one that is none of these is printed as it was fitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from differ.causes.context import Context
from tracer.reader import Trace
from tracer.schema import Phase

CLOSE: Final = 1e-4
# A standard error larger than this is no basis for a match.
LOOSE: Final = 2e-3

_RANK: Final = ("lora.rank", "lora.r")
_ALPHA: Final = ("lora.alpha", "lora.lora_alpha")
_ACCUMULATION: Final = ("accumulation", "train.accumulation")
_PROCESSES: Final = ("world_size", "trainer.args.world_size", "num_processes", "trainer.args.num_processes")


def short(value: float) -> float:
    """A fitted constant without the digits that float32 left uncertain: 3.9999998 is 4.0."""
    near = float(f"{value:.3g}")
    return near if abs(near - value) <= 1e-5 * abs(value) else float(f"{value:.6g}")


def name_factor(context: Context, step: int, factor: float, error: float = 0.0) -> str:
    """What the factor, or its inverse, is equal to: `the number of micro-batches (4)`; empty for nothing known.

    At step 0 there is no batch yet, and no gradient that processes share.
    """
    if not factor > 0.0 or factor == 1.0:
        return ""
    size = max(factor, 1.0 / factor)
    allowed = max(CLOSE, min(LOOSE, 5.0 * error / factor))
    found = [
        words for number, words in _candidates(context, step) if number > 1.0 and abs(size / number - 1.0) <= allowed
    ]
    return " or ".join(list(dict.fromkeys(found))[:2])


def setting(trace: Trace, *keys: str) -> float | None:
    """The first of some settings that is a number, as declared or as observed."""
    for settings in (trace.declared, trace.observed):
        for key in keys:
            number = _number(settings, key)
            if number is not None:
                return number
    return None


def _candidates(context: Context, step: int) -> Iterator[tuple[float, str]]:
    for side in "ab":
        trace = context.trace(side)
        if step > 0:
            micro = len(trace.micro_batches(Phase.BATCH, step) or trace.micro_batches(Phase.LOSS, step))
            yield float(micro), f"the number of micro-batches ({micro})"
        rank, alpha = setting(trace, *_RANK), setting(trace, *_ALPHA)
        if rank:
            yield rank, f"the LoRA rank ({rank:g})"
        if alpha:
            yield alpha, f"the LoRA alpha ({alpha:g})"
        if rank and alpha:
            yield max(alpha / rank, rank / alpha), f"alpha / rank ({alpha / rank:g})"
        processes = setting(trace, *_PROCESSES)
        if processes and step > 0:
            yield processes, f"the number of processes ({processes:g})"
    yield from _ratios(context, step)
    if step > 0:
        yield from _batch(context, step)


def _ratios(context: Context, step: int) -> Iterator[tuple[float, str]]:
    """Ratios of what both sides say of the adapters and, once there are batches, of accumulation."""
    settings = [(_ALPHA, "alpha"), (_RANK, "rank")]
    settings += [(_ACCUMULATION, "accumulation")] if step > 0 else []
    for keys, words in settings:
        a, b = setting(context.a, *keys), setting(context.b, *keys)
        if a and b and a > 0.0 and b > 0.0:
            yield max(a / b, b / a), f"the ratio of the two sides' {words} ({a:g}, {b:g})"


def _batch(context: Context, step: int) -> Iterator[tuple[float, str]]:
    numbers = context.micro_batches(Phase.BATCH, step)
    tokens = [context.scalar("a", Phase.BATCH, step, "tokens", number) for number in numbers]
    known = [count for count in tokens if count]
    if known:
        yield sum(known), f"the supervised positions of the step ({sum(known):g})"
        if len(set(known)) == 1:
            yield known[0], f"the supervised positions of a micro-batch ({known[0]:g})"
    row = context.row("a", Phase.BATCH, step, numbers[0]) if numbers else None
    if row is not None and "input_ids" in row.positions and len(row.shape("input_ids")) == 2:
        rows, _ = row.shape("input_ids")
        yield float(rows), f"the rows of a batch ({rows})"


def _number(settings: Mapping[str, Any], key: str) -> float | None:
    value = settings.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
