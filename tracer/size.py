"""How large a trace will be, said before the first step is recorded.

An estimate from the trainable tensors of step 0: each is recorded again at every step as a parameter and as a gradient, and with
the two moments that Adam keeps of it.  A clipped gradient (one more) and module outputs are not known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tracer.dtypes import DTYPES, is_float
from tracer.schema import Phase, Record

# Tensors of a parameter's size that a step holds, by phase.
COPIES: Final = {Phase.GRAD: 1, Phase.OPT_STATE: 2, Phase.PARAM: 1}
# Where a run says how many steps it will make.
STEP_KEYS: Final = ("train.steps", "trainer.args.max_steps", "trainer.args.iters")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Trainable tensors, bytes that a step will take, and steps if the run has said how many."""

    tensors: int
    step_bytes: int
    steps: int | None

    def sentence(self, full_steps: int | None = None) -> str:
        """`252 trainable tensors, about 2.6 MB a step, 26 MB for 10 steps`."""
        text = f"{self.tensors} trainable tensors, about {human_bytes(self.step_bytes)} a step"
        if self.steps is None:
            return text
        kept = self.steps if full_steps is None else min(self.steps, full_steps)
        thinned = f", {self.steps - kept} more thinned" if kept < self.steps else ""
        return f"{text}, {human_bytes(kept * self.step_bytes)} for {kept} step{'s' * (kept != 1)}{thinned}"


def estimate(
    start: Iterable[Record], what: Iterable[Phase], window: tuple[int, int] | None, *documents: Mapping[str, Any]
) -> Estimate:
    """Estimate from the records of `init`; `window`: the first and last step to record; `documents`: declared and observed."""
    trained = [record for record in start if record.stored and is_float(record.dtype) and math.prod(record.shape) > 1]
    elements = sum(math.prod(record.shape) * DTYPES[record.dtype].itemsize for record in trained)
    copies = sum(COPIES.get(phase, 0) for phase in set(what))
    return Estimate(len(trained), copies * elements, _steps(window, documents))


def _steps(window: tuple[int, int] | None, documents: tuple[Mapping[str, Any], ...]) -> int | None:
    known = [document.get(key) for document in documents for key in STEP_KEYS]
    said = next((value for value in known if isinstance(value, int) and value > 0), None)
    if window is None:
        return said
    last = window[1] if said is None else min(window[1], said)
    return max(0, last - max(1, window[0]) + 1) if last < 2**31 else None


def human_bytes(count: float) -> str:
    """`12.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def parse_bytes(text: str) -> int:
    """`2GB`, `500 MB`, `1048576` in bytes, decimal units.  Raises ValueError."""
    number = text.strip().lower().removesuffix("b").strip()
    factor = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}.get(number[-1:], 1)
    size = float(number if factor == 1 else number[:-1]) * factor
    if not 1 <= size < 2**62:
        raise ValueError(text)
    return int(size)
