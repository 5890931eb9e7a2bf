"""What it means that a run of a sweep passes: the same as its reference, or a value on one side of a threshold."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from tracer.dtypes import to_float64
from tracer.errors import BadUsage, TraceError
from tracer.reader import Trace, open_trace
from tracer.schema import Phase

SAME: Final = "same"
LOSS: Final = "loss"
_COMPARE: Final[dict[str, Callable[[float, float], bool]]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_FORM = re.compile(r"\s*(?:eval:(?P<name>\S+?)|(?P<loss>loss))\s*(?P<sign><=|>=|<|>)\s*(?P<limit>\S+)\s*")


class NoValue(TraceError):
    """A run that did not log the value that it is judged by."""

    slug = "no-value"


@dataclass(frozen=True, slots=True)
class Rule:
    """`name` is `same`, `loss` (mean of the last step's micro-batches) or the name of an eval record (its last value)."""

    name: str = SAME
    sign: str = "<="
    limit: float = 0.0

    @property
    def compares(self) -> bool:
        """Whether two runs are compared, and not one judged by itself."""
        return self.name == SAME

    def __str__(self) -> str:
        if self.compares:
            return SAME
        return f"{self.name if self.name == LOSS else f'eval:{self.name}'}{self.sign}{self.limit:g}"

    def value(self, file: Path) -> float:
        """The value of a trace; raises NoValue."""
        with open_trace(file) as trace:
            found = _last_loss(trace) if self.name == LOSS else _last_logged(trace, self.name)
        if found is None:
            raise NoValue(f"the run recorded no {self.name}", "log it with tracer.log, or pass on loss or same")
        return found

    def passes(self, value: float) -> bool:
        """Whether a value passes; nan never does."""
        return _COMPARE[self.sign](value, self.limit)


def parse_rule(text: str) -> Rule:
    """`same`, `loss<=2.5` or `eval:NAME>=0.9`; raises BadUsage."""
    if text.strip() == SAME:
        return Rule()
    match = _FORM.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        return Rule(match["name"] or LOSS, match["sign"], float(match["limit"]))
    except ValueError:
        raise BadUsage(f"--pass {text} cannot be read", "write same, loss<=2.5 or eval:NAME>=0.9") from None


def _last_loss(trace: Trace) -> float | None:
    micro_batches = trace.micro_batches(Phase.LOSS, trace.last_step)
    values = [_scalar(trace, Phase.LOSS, trace.last_step, number, "loss") for number in micro_batches]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _last_logged(trace: Trace, name: str) -> float | None:
    for step in reversed(trace.steps):
        for number in reversed(trace.micro_batches(Phase.EVAL, step)):
            value = _scalar(trace, Phase.EVAL, step, number, name)
            if value is not None:
                return value
    return None


def _scalar(trace: Trace, phase: Phase, step: int, micro_batch: int, name: str) -> float | None:
    row = trace.row(phase, step, micro_batch)
    if row is None or name not in row.layout.positions:
        return None
    at = row.layout.positions[name]
    array = row.read(at)
    return float(to_float64(array, row.layout.entries[at].dtype).reshape(-1)[0]) if array.size == 1 else None
