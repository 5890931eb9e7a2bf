"""The smallest fault that is found, by bisection over its size, for one kind of fault after the other.

The last step of one recorded run is made again in numpy with the fault in it: gradient, moments and weights follow from
each other as torch computes them, and the trace is written anew.  Compared are an MLX run with itself so changed, and
the PyTorch run with the changed MLX run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from differ import Verdict, diff
from tests.bench.accuracy.arms import Arm
from tests.bench.accuracy.edits import rewrite
from tracer.names import split_state_name
from tracer.reader import open_trace
from tracer.schema import Phase, Record, Row

Array = npt.NDArray[Any]
_SETTINGS: Final = {
    "train.steps": 3,
    "lora.rank": 4,
    "lora.targets": ["q_proj", "v_proj"],
    "optimizer.weight_decay": 0.01,
}
TORCH: Final = Arm("torch", _SETTINGS)
MLX: Final = Arm("mlx", {**_SETTINGS, "train.compile": False}, source=TORCH)
LAST: Final = 3
_ONE: Final = "model.layers.1.self_attn.q_proj.lora_B.weight"


@dataclass(frozen=True)
class Update:
    """What the made-again step uses; the recorded settings stay as they are unless `recorded` changes them."""

    gradient: Callable[[str, Array], Array] = lambda _, g: g
    used: Mapping[str, float] | None = None
    recorded: Mapping[str, float] | None = None
    loss: float = 1.0
    weight: Callable[[str, Array], Array] = lambda _, w: w


def _element(size: float) -> Callable[[str, Array], Array]:
    def change(name: str, values: Array) -> Array:
        if name != _ONE:
            return values
        result = values.copy()
        result.flat[5] += np.float32(size * math.sqrt(float(np.mean(np.square(values, dtype=np.float64)))))
        return result

    return change


def _scaled(size: float, name: str = "") -> Callable[[str, Array], Array]:
    return lambda n, g: (g * np.float32(1 + size)).astype(np.float32) if name in n else g


# Kind of fault and its unit -> the step with a fault of that size.
KINDS: Final[dict[str, Callable[[float], Update]]] = {
    "gradient: factor 1 + x, all": lambda x: Update(gradient=_scaled(x)),
    "gradient: factor 1 + x, one tensor": lambda x: Update(gradient=_scaled(x, _ONE)),
    "gradient: one element, x times the tensor's rms": lambda x: Update(gradient=_element(x)),
    "loss and gradients: factor 1 + x": lambda x: Update(gradient=_scaled(x), loss=1 + x),
    "lr: factor 1 + x, recorded": lambda x: Update(used={"lr": 1e-3 * (1 + x)}, recorded={"lr": 1e-3 * (1 + x)}),
    "lr: factor 1 + x, not recorded": lambda x: Update(used={"lr": 1e-3 * (1 + x)}),
    "weight decay: 0.01 + x, not recorded": lambda x: Update(used={"weight_decay": 0.01 + x}),
    "eps: 1e-8 + x, not recorded": lambda x: Update(used={"eps": 1e-8 + x}),
    "beta1: 0.9 (1 - x), not recorded": lambda x: Update(used={"beta1": 0.9 * (1 - x)}),
    "beta2: 0.999 (1 - x), not recorded": lambda x: Update(used={"beta2": 0.999 * (1 - x)}),
    "weights: one element, x times the tensor's rms": lambda x: Update(weight=_element(x)),
}


def changed(source: Path, target: Path, update: Update) -> Path:
    """The trace with its last step made again."""
    with open_trace(source) as trace:
        read = _Reader(trace)
        made = read.again(update)
    hparams = {f"group0.{key}": value for key, value in (update.recorded or {}).items()}

    def change(row: Row) -> Row:
        if row.step != LAST:
            return row
        records = row.records
        if row.phase is Phase.LOSS:
            records = tuple(_with(r, r.data * np.float32(update.loss)) if r.name == "loss" else r for r in records)  # type: ignore[operator]
        records = tuple(_with(r, made[row.phase, r.name]) if (row.phase, r.name) in made else r for r in records)
        if row.phase is Phase.HPARAMS:
            records = tuple(_with(r, np.float64(hparams[r.name])) if r.name in hparams else r for r in records)
        return replace(row, records=records)

    return rewrite(source, target, change)


def _with(record: Record, data: Any) -> Record:
    if record.alias_of:
        return record
    assert record.data is not None
    return replace(record, data=np.asarray(data, record.data.dtype).reshape(record.shape))


class _Reader:
    def __init__(self, trace: Any) -> None:
        self.trace = trace

    def row(self, phase: Phase, step: int) -> dict[str, Array]:
        view = self.trace.row(phase, step)
        return {e.name: view.read(i) for i, e in enumerate(view.layout.entries) if view.stored(i)}

    def again(self, update: Update) -> dict[tuple[Phase, str], Array]:
        """New gradients, moments and weights of the last step, float32 as torch computes them."""
        settings = {
            name.partition(".")[2]: float(v)
            for name, v in self.row(Phase.HPARAMS, LAST).items()
            if "." in name and v.size == 1
        }
        use = {**settings, **(update.used or {})}
        made: dict[tuple[Phase, str], Array] = {}
        before, state = self.row(Phase.PARAM, LAST - 1), self.row(Phase.OPT_STATE, LAST - 1)
        for name, gradient in self.row(Phase.GRAD, LAST).items():
            if name not in before:
                continue
            g = update.gradient(name, gradient)
            m, v, w = adamw(before[name], g, state[f"{name}/exp_avg"], state[f"{name}/exp_avg_sq"], use, LAST)
            made[Phase.GRAD, name] = g
            made[Phase.OPT_STATE, f"{name}/exp_avg"], made[Phase.OPT_STATE, f"{name}/exp_avg_sq"] = m, v
            made[Phase.PARAM, name] = update.weight(name, w)
            assert split_state_name(f"{name}/exp_avg")[0] == name
        return made


def adamw(w: Array, g: Array, m: Array, v: Array, use: Mapping[str, float], t: int) -> tuple[Array, Array, Array]:
    """One AdamW update (arXiv:1711.05101) in float64, rounded to float32: moments and weights."""
    g64 = g.astype(np.float64)
    m64 = use["beta1"] * m.astype(np.float64) + (1 - use["beta1"]) * g64
    v64 = use["beta2"] * v.astype(np.float64) + (1 - use["beta2"]) * g64**2
    c1, c2 = 1 - use["beta1"] ** t, 1 - use["beta2"] ** t
    w64 = w.astype(np.float64) * (1 - use["lr"] * use["weight_decay"])
    w64 -= use["lr"] * (m64 / c1) / (np.sqrt(v64 / c2) + use["eps"])
    return m64.astype(np.float32), v64.astype(np.float32), w64.astype(np.float32)


@dataclass(frozen=True)
class Smallest:
    """Smallest size that is called a divergence, and that is at least noted; None: not even the largest tried."""

    diverged: float | None
    noted: float | None


def smallest(kind: str, a: Path, source: Path, scratch: Path) -> Smallest:
    """Bisect over the size of a fault in `source`, against `a`, to within a factor of 10^(1/8)."""
    seen: dict[float, tuple[bool, bool]] = {}

    def at(exponent: float) -> tuple[bool, bool]:
        if exponent not in seen:
            result = diff(a, changed(source, scratch, KINDS[kind](10.0**exponent)))
            found = result.verdict is Verdict.DIVERGED
            seen[exponent] = (found, found or bool(result.systematic))
        return seen[exponent]

    return Smallest(_bisect(lambda e: at(e)[0]), _bisect(lambda e: at(e)[1]))


def _bisect(found: Callable[[float], bool]) -> float | None:
    low, high = -10.0, 0.0
    if not found(high):
        return None
    while high - low > 0.125:
        middle = (low + high) / 2
        low, high = (low, middle) if found(middle) else (middle, high)
    return float(10.0**high)
