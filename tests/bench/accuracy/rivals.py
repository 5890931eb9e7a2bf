"""The same pairs through what people use without this tool: h5diff, per-tensor closeness, loss curves.

Each is given more than it has by itself: records lined up by canonical name, settings and batches as data sets, steps and phases
in causal order, no time stamps or random states, nan equal to nan, statistics where only those of a frozen weight are in
the file, and the threshold that is best in hindsight over all pairs of this benchmark.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import numpy.typing as npt

from tracer.dtypes import is_float, to_numpy
from tracer.names import NameMap
from tracer.reader import Trace, open_trace
from tracer.schema import RNG_PREFIX, Phase, State

Array = npt.NDArray[Any]
Address = tuple[int, str, str]
# Default tolerances (relative, absolute) of numpy.allclose and of torch.testing.assert_close by dtype.
ALLCLOSE: Final = (1e-5, 1e-8)
ASSERT_CLOSE: Final = {
    "float16": (1e-3, 1e-5),
    "bfloat16": (1.6e-2, 1e-5),
    "float32": (1.3e-6, 1e-5),
    "float64": (1e-7, 1e-7),
}
_names = NameMap()


@dataclass(frozen=True)
class Tensor:
    """One tensor as somebody who compares tensors has it; `dtype` chooses the tolerance."""

    values: Array
    dtype: str


def tensors(trace: Trace) -> Iterator[tuple[Address, Tensor]]:
    """All tensors in causal order.  Two micro-batches' records have names of their own."""
    for view in trace.rows():
        for i, entry in enumerate(view.layout.entries):
            if entry.name.startswith(RNG_PREFIX):
                continue
            # A whole step's gradient beside those of its micro-batches: these have numbers, the first too.
            first = 0 if view.phase is Phase.GRAD else 1
            micro = f"/{view.micro_batch}" if view.micro_batch >= first else ""
            address = (view.step, view.phase.label, entry.name + micro)
            if view.state(i) not in (State.VALUE, State.ZERO):
                continue
            if view.stored(i):
                values = to_numpy(view.read(i), entry.dtype)
                yield address, Tensor(values, entry.dtype)
            else:
                yield address, Tensor(view.stats[i], "float32")


def closeness(a: Path, b: Path) -> dict[str, Any]:
    """First tensor that is not close, for both functions, and the loss of each step on both sides, as JSON."""
    with open_trace(a) as x, open_trace(b) as y:
        mine, theirs = dict(tensors(x)), dict(tensors(y))
    found: dict[str, Any] = {"allclose": None, "assert_close": None}
    with np.errstate(all="ignore"):
        # The libraries' models are not cut into the same modules.
        shared = {*mine, *theirs} - {each for each in mine.keys() ^ theirs.keys() if each[1] == Phase.FORWARD.label}
        for address in sorted(shared, key=_causal):
            for how in found:
                if found[how] is None and not _close(how, mine.get(address), theirs.get(address)):
                    found[how] = list(address)
    return {**found, "loss": [_losses(mine), _losses(theirs)]}


def _causal(address: Address) -> tuple[int, int, str]:
    return address[0], int(Phase.parse(address[1])), address[2]


def _close(how: str, a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.values.shape != b.values.shape:
        return False
    dtype = a.dtype if not is_float(b.dtype) or a.dtype in ("bfloat16", "float16") else b.dtype
    relative, absolute = ALLCLOSE if how == "allclose" else ASSERT_CLOSE.get(dtype, (0.0, 0.0))
    x, y = a.values.astype(np.float64), b.values.astype(np.float64)
    return bool(np.allclose(x, y, rtol=relative, atol=absolute, equal_nan=True))


def _losses(found: Mapping[Address, Tensor]) -> dict[str, float]:
    each: dict[int, list[float]] = {}
    for (step, phase, name), tensor in found.items():
        if phase == Phase.LOSS.label and name.partition("/")[0] == "loss":
            each.setdefault(step, []).append(float(tensor.values))
    return {str(step): float(np.mean(values)) for step, values in each.items()}


def loss_apart(loss: Sequence[Mapping[str, float]]) -> tuple[float, int]:
    """Largest relative difference of two loss curves; infinite where one is not finite or shorter."""
    a, b = loss
    worst, at = 0.0, 0
    for step in {*a, *b}:
        x, y = a.get(step, math.nan), b.get(step, math.nan)
        apart = abs(x - y) / abs(x) if x else abs(y)
        apart = apart if math.isfinite(apart) else math.inf
        if apart > worst:
            worst, at = apart, int(step)
    return worst, at


def first_beyond(loss: Sequence[Mapping[str, float]], threshold: float) -> int | None:
    """First step at which two loss curves are further apart than a threshold."""
    a, b = loss
    for step in sorted({*a, *b}, key=int):
        one = [{step: side[step]} if step in side else {} for side in (a, b)]
        if loss_apart(one)[0] > threshold:
            return int(step)
    return None


def best_threshold(faults: Sequence[float], clean: Sequence[float]) -> float:
    """The threshold with the most (share of faults above it) − (share of clean pairs above it)."""
    candidates = sorted({0.0, *(v for v in (*faults, *clean) if math.isfinite(v))})

    def gain(threshold: float) -> float:
        above = [sum(v > threshold for v in values) / max(1, len(values)) for values in (faults, clean)]
        return above[0] - above[1]

    return max(candidates, key=gain)


# h5diff.


def has_h5diff() -> bool:
    """Whether the program is installed."""
    return shutil.which("h5diff") is not None


def plain_file(trace: Path, target: Path) -> Path:
    """A trace as one data set a tensor, `/00002/06 grad/name`, which is what h5diff can line up."""
    if target.exists():
        return target
    part = target.with_suffix(".part")
    with open_trace(trace) as source, h5py.File(part, "w") as file:
        for (step, phase, name), tensor in tensors(source):
            values = tensor.values
            values = values.astype(np.float32) if values.dtype.itemsize == 2 and values.dtype.kind == "f" else values
            file[f"{step:05d}/{int(Phase.parse(phase)):02d} {phase}/{name.replace('/', '|')}"] = values
    part.replace(target)
    return target


def worst_relative(a: Path, b: Path) -> float:
    """Largest |b − a| / |a| of any element that both plain files hold: what h5diff compares with its -p."""
    worst = 0.0
    with open_trace(a) as x, open_trace(b) as y, np.errstate(all="ignore"):
        theirs = dict(tensors(y))
        for address, tensor in tensors(x):
            other = theirs.get(address)
            if other is None or other.values.shape != tensor.values.shape:
                continue
            p, q = tensor.values.astype(np.float64), other.values.astype(np.float64)
            apart = np.where(p == q, 0.0, np.abs(q - p) / np.abs(p))
            apart[np.isnan(p) & np.isnan(q)] = 0.0
            worst = max(worst, float(np.where(np.isnan(apart), np.inf, apart).max(initial=0.0)))
    return worst


def h5diff(a: Path, b: Path, tolerance: float) -> dict[str, Any]:
    """Exit code and first object of `h5diff -p TOLERANCE`, on plain files."""
    command = ["h5diff", "-n", "1", "-p", f"{max(tolerance, 1e-15):.12g}", str(a), str(b)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    first = re.search(r"^(?:dataset|group): <([^>]*)>", done.stdout, re.MULTILINE)
    address = None
    if done.returncode == 1 and first:
        parts = first[1].strip("/").split("/")
        if len(parts) == 3:
            address = [int(parts[0]), parts[1].partition(" ")[2], parts[2].replace("|", "/")]
    return {"code": done.returncode, "first": address}
