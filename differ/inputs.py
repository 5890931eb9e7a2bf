"""How far apart the two sides' parameters are before a step, as far as the model's outputs can feel it.

    LoRA module          scale * (|dB| |A| + |B| |dA|) / |W|      to first order, Frobenius norms
    other parameter      |dw| / max(|w_a|, |w_b|)
    gradient of a factor adds the relative error of the other factor, which it is proportional to

Adapters start with B = 0, so different A alone do not move the outputs, and the distance says so.  |W| is the frozen
weight's norm in the statistics at init.  Computed only when a step needs it; the last one is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from differ.align import Row, Rows
from differ.estimate import is_trainable, row_distance
from tracer.schema import RNG_PREFIX, Phase

LORA_A: Final = ".lora_A.weight"
LORA_B: Final = ".lora_B.weight"
LORA_SCALE: Final = ".lora_scale"


@dataclass(frozen=True, slots=True)
class InputDistance:
    """Distances before one step: `model` for all outputs, `own` the relative L2 error of each parameter that differs."""

    model: float
    own: Mapping[str, float]

    def of_gradient(self, name: str) -> float:
        """Distance of the inputs of a parameter's gradient."""
        if name.endswith(LORA_A):
            return self.model + self.own.get(name.removesuffix(LORA_A) + LORA_B, 0.0)
        if name.endswith(LORA_B):
            return self.model + self.own.get(name.removesuffix(LORA_B) + LORA_A, 0.0)
        return self.model


_NONE: Final = InputDistance(0.0, {})


@dataclass(frozen=True, slots=True)
class _Change:
    """L2 norms of one parameter: of the difference, and of the larger side."""

    diff: float
    norm: float

    @property
    def relative(self) -> float:
        return self.diff / self.norm if self.norm > 0.0 else 0.0


class Inputs:
    """Distances between the parameters of two traces, by step."""

    def __init__(self, a: Rows, b: Rows) -> None:
        self._a = a
        self._b = b
        self._step = -1
        self._last: InputDistance | None = None

    def before(self, step: int) -> InputDistance | None:
        """Distance of the parameters that step starts from; None if a side did not record them."""
        if step != self._step:
            self._step, self._last = step, self._measure(step)
        return self._last

    def _measure(self, step: int) -> InputDistance | None:
        a, b = parameters_before(self._a, step), parameters_before(self._b, step)
        if a is None or b is None:
            return None
        if a.view.seal == b.view.seal:
            return _NONE
        names = dict.fromkeys([*a.positions, *b.positions])
        rows = ((name, _holder(self._a, a, name), _holder(self._b, b, name)) for name in names)
        changes = {name: _change(x, y, name) for name, x, y in rows if _comparable(x, y, name)}
        own = {name: change.relative for name, change in changes.items() if change.diff > 0.0}
        # Of both sides, so that it does not matter which is a where they differ.
        inits = [init for rows in (self._a, self._b) if (init := rows.get(Phase.INIT, 0)) is not None]
        model = max((_effect(name, changes, inits) for name in own), default=0.0)
        return InputDistance(model, own)


def parameters_before(rows: Rows, step: int) -> Row | None:
    """The row that holds the parameters before a step: those after the step before, or those of init."""
    return rows.get(Phase.INIT, 0) if step <= 1 else rows.get(Phase.PARAM, step - 1)


def is_unheld(rows: Rows, step: int, name: str) -> bool:
    """Whether a run trains a parameter that its optimizer does not hold.

    It is trainable at init and gets a gradient, there is neither a clipped gradient nor state of it where others have them, and
    after the step it is what it was before, or is not recorded any more.
    """
    init, gradients = rows.get(Phase.INIT, 0), rows.get(Phase.GRAD, step)
    if init is None or name not in init.positions or not is_trainable(init, name):
        return False
    if gradients is not None and name not in gradients.positions:
        return False
    given = [row for phase in (Phase.CLIPPED_GRAD, Phase.OPT_STATE) if (row := rows.get(phase, step)) is not None]
    if any(name in row.positions or name in row.float_state for row in given):
        return False
    after, before = rows.get(Phase.PARAM, step), parameters_before(rows, step)
    if after is None or name not in after.positions:
        return after is not None or bool(given)
    digest = after.digest(name)
    return bool(given and digest) and before is not None and name in before.positions and digest == before.digest(name)


def _holder(rows: Rows, row: Row, name: str) -> Row:
    """The row that holds a parameter: what an optimizer does not hold is what it was at init."""
    init = None if name in row.positions else rows.get(Phase.INIT, 0)
    return row if init is None or name not in init.positions else init


def _comparable(a: Row, b: Row, name: str) -> bool:
    """Whether a record is a parameter that both sides hold, in one shape; a generator's state is no input of the model."""
    if name not in a.positions or name not in b.positions or name.endswith(LORA_SCALE) or name.startswith(RNG_PREFIX):
        return False
    if a.entry(name).alias_of:
        return False
    return is_trainable(a, name) and is_trainable(b, name) and a.shape(name) == b.shape(name)


def _change(a: Row, b: Row, name: str) -> _Change:
    norm = max(a.l2(name), b.l2(name))
    if a.digest(name) and a.digest(name) == b.digest(name):
        return _Change(0.0, norm)
    measured = row_distance(a, b, name)
    if measured is None:
        return _Change(float("inf"), norm)
    return _Change(measured.diff if measured.nonfinite < 0 else float("inf"), norm)


def _effect(name: str, changes: Mapping[str, _Change], inits: Sequence[Row]) -> float:
    """Relative change of the module that a parameter belongs to."""
    module = name.removesuffix(LORA_A).removesuffix(LORA_B)
    a, b = changes.get(module + LORA_A), changes.get(module + LORA_B)
    if a is None or b is None:
        return changes[name].relative
    weight = f"{module}.weight"
    base = max((init.l2(weight) for init in inits if weight in init.positions), default=0.0)
    if base <= 0.0:
        return b.relative + (a.relative if b.norm > 0.0 else 0.0)
    scales = [abs(scale) for init in inits if (scale := init.scalar(module + LORA_SCALE)) is not None]
    return max(scales, default=1.0) * (b.diff * a.norm + b.norm * a.diff) / base
