"""`forward.rotary`: the table of rotary angles is another one: of another base, or computed in low precision.

    table  T(p, i) = cos(p θ_i), θ_i = base^(-i/k), i < k, the k columns once or twice     p: position_ids, else the column
    base   from column 1, cos(p base^(-1/k)), by a grid of rates; then by Gauss-Newton over the whole table
    low    with rd rounding to bf16 or fp16     rates  cos(p rd(θ))     angles  cos(rd(rd(p) rd(θ)))     tables  rd of that
    undone b - T_b + T_a

A side has a base only if its whole table is that to within what float32 makes of p θ; a side that has none is tried in low
precision with the other's.  Tables that are scaled or stretched (yarn, llama3) have no such base and are not claimed.

Source: angles in bfloat16 (transformers #29285, #29496; Modalities #462: 0.62 off at position 512); a `rope_theta` that a
loader does not read.  Only where the table was recorded: `--modules '*'` or `'*rotary_emb'`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from differ.causes.batches import POSITIONS
from differ.causes.constants import short
from differ.causes.context import Context, Float64
from differ.causes.fit import SHOWN, Sums, squared
from differ.causes.grid import GRIDS, round_to
from differ.causes.words import number
from differ.result import Cause, Finding
from tracer.dtypes import EPSILON
from tracer.schema import WHOLE_STEP, Phase

ID: Final = "forward.rotary"

# Rates that are tried are so many to the step in which the last position turns by a radian.
FINENESS: Final = 4
# Rows that the fit looks at; what it finds must hold for all.
ROWS: Final = 256
# Positions beyond it are left out of the grid; the fit has them.
FARTHEST: Final = 4096
_STEPS: Final = 8
STAGES: Final = {"rates": "rates", "angles": "angles", "tables": "angles and cosines"}
# Rates that are refined, of those that the grid finds; log of the largest base.
LIKELY: Final = 16
LARGEST: Final = 100.0
# Rows and columns of a table from which on one base says anything.
FEWEST: Final = 4


@dataclass(frozen=True, slots=True)
class _Tables:
    """The first module output with a finding, as tables [n, k] of both sides at positions [n]."""

    first: Finding
    positions: Float64
    a: Float64
    b: Float64
    dtype_a: str
    dtype_b: str


@dataclass(frozen=True, slots=True)
class _Low:
    """A table in low precision: the dtype, from which stage on it holds, and the table."""

    dtype: str
    stage: str
    table: Float64


def find(context: Context) -> list[Cause]:
    """At most one cause, for the first module output with a finding."""
    tables = _tables(context)
    if tables is None:
        return []
    base_a = _base(tables.positions, tables.a, tables.dtype_a)
    base_b = _base(tables.positions, tables.b, tables.dtype_b)
    if base_a is not None and base_b is not None:
        return _other_base(tables, base_a, base_b)
    if base_a is not None:
        return _low_precision(tables, base_a, "b")
    return [] if base_b is None else _low_precision(tables, base_b, "a")


def _tables(context: Context) -> _Tables | None:
    findings = context.findings_in(Phase.FORWARD)
    if not findings or findings[0].name is None:
        return None
    first = findings[0]
    assert first.name is not None
    at = WHOLE_STEP if first.micro_batch is None else first.micro_batch
    both = context.pair(Phase.FORWARD, first.step, first.name, at)
    positions = _positions(context, first.step, at)
    if both is None or positions is None or both[0].ndim != 2 or len(positions) != len(both[0]):
        return None
    a, b = (_columns(values) for values in both)
    if a is None or b is None or a.shape != b.shape:
        return None
    dtypes = [context.dtype(side, Phase.FORWARD, first.step, first.name, at) or "" for side in "ab"]
    return _Tables(first, positions, a, b, dtypes[0], dtypes[1])


def _positions(context: Context, step: int, micro_batch: int) -> Float64 | None:
    """Position of each row of the outputs: as the batch gives it, the same on both sides, or its column."""
    where = context.positions(step, micro_batch)
    if where is None:
        return None
    given = context.pair(Phase.BATCH, step, POSITIONS, micro_batch)
    names = [context.names(side, Phase.BATCH, step, micro_batch) for side in "ab"]
    if given is None:
        return None if any(POSITIONS in known for known in names) else where[:, 1].astype(np.float64)
    a, b = given
    if a.ndim != 2 or not np.array_equal(a, b) or where[:, 1].max(initial=0) >= a.shape[1]:
        return None
    found: Float64 = a[np.minimum(where[:, 0], len(a) - 1), where[:, 1]]
    return found


def _columns(values: Float64) -> Float64 | None:
    """The columns with a rate of their own, [n, k]; None if that is no table of cosines."""
    rows, width = values.shape
    if rows < FEWEST or width < FEWEST or not np.isfinite(values).all() or np.abs(values).max() > 1.0:
        return None
    left, right = values[:, : width // 2], values[:, width // 2 :]
    return left if np.array_equal(left, right) else values


def _table(positions: Float64, columns: int, base: float) -> Float64:
    """cos(p base^(-i/k)), [n, k]."""
    return np.cos(positions[:, None] * _of_base(base, columns))


def _of_base(base: float, columns: int) -> Float64:
    rates: Float64 = base ** (-np.arange(columns) / columns)
    return rates


def _base(positions: Float64, values: Float64, dtype: str) -> float | None:
    """The base of a table; None if no base gives all of it."""
    # Column 0 turns by a radian a position, whatever the base.
    if not _gives(positions, values[:, :1], 1.0, dtype):
        return None
    every = -(-len(positions) // ROWS)
    base = _fitted(positions[::every], values[::every])
    return base if base is not None and _gives(positions, values, base, dtype) else None


def _fitted(positions: Float64, values: Float64) -> float | None:
    """The base nearest to a table."""
    columns = values.shape[1]
    near = positions <= FARTHEST
    reach = float(positions[near].max(initial=0.0))
    if reach < 1.0:
        return None
    grid = np.arange(1, math.ceil(reach * FINENESS)) / (reach * FINENESS)
    error = np.square(np.cos(grid[:, None] * positions[near]) - values[near, 1]).sum(axis=1)
    # Positions with a common divisor leave several rates possible for one column, but not for all.
    likely = np.argsort(np.where(error <= np.minimum(_shifted(error, 1), _shifted(error, -1)), error, np.inf))[:LIKELY]
    found = [_refined(positions, values, -columns * math.log(rate), 2) for rate in grid[likely]]
    left = [squared(_table(positions, columns, math.exp(log_base)) - values) for log_base in found]
    if not found:
        return None
    return short(math.exp(_refined(positions, values, found[int(np.argmin(left))], columns)))


def _shifted(error: Float64, by: int) -> Float64:
    """Each element's neighbour, infinity beyond the ends."""
    beside = np.full(error.size, np.inf)
    if by > 0:
        beside[by:] = error[:-by]
    else:
        beside[:by] = error[-by:]
    return beside


def _refined(positions: Float64, values: Float64, log_base: float, used: int) -> float:
    """Log base by Gauss-Newton over the first columns: d cos(p θ_i) / d log base = p θ_i (i / k) sin(p θ_i)."""
    share = np.arange(used) / values.shape[1]
    for _ in range(_STEPS):
        angles = positions[:, None] * np.exp(-share * log_base)
        slope = angles * share * np.sin(angles)
        size = squared(slope)
        if size == 0.0:
            break
        step = float((slope * (values[:, :used] - np.cos(angles))).sum()) / size
        log_base = min(max(log_base + step, 0.0), LARGEST)
    return log_base


def _gives(positions: Float64, values: Float64, base: float, dtype: str) -> bool:
    """Whether a base gives a table: to what float32 makes of an angle, and the dtype of its cosine."""
    angles = positions[:, None] * _of_base(base, values.shape[1])
    allowed = EPSILON.get(dtype, 0.0) + 4.0 * EPSILON["float32"] * (1.0 + angles)
    return bool((np.abs(np.cos(angles) - values) <= allowed).all())


def _other_base(tables: _Tables, base_a: float, base_b: float) -> list[Cause]:
    of_a, of_b = (_table(tables.positions, tables.a.shape[1], base) for base in (base_a, base_b))
    sums = Sums()
    sums.add(tables.a, tables.b, tables.b - of_b + of_a)
    summary = f"rotary base {number(base_a)} in a, {number(base_b)} in b"
    return _cause(tables, summary, None, {"base_a": base_a, "base_b": base_b}, sums.share)


def _low_precision(tables: _Tables, base: float, side: str) -> list[Cause]:
    """The side without a base has the other's, in low precision."""
    positions, columns = tables.positions, tables.a.shape[1]
    low, other, dtype = (tables.a, tables.b, tables.dtype_a) if side == "a" else (tables.b, tables.a, tables.dtype_b)
    exact = _table(positions, columns, base)
    found = min(_lows(positions, columns, base, dtype), key=lambda one: squared(low - one.table))
    sums = Sums()
    sums.add(other, low, low - found.table + exact)
    error = float(np.abs(low - exact).max())
    summary = (
        f"{side} computes its rotary {STAGES[found.stage]} in {found.dtype}: off by up to {number(error, 2)} in the "
        f"cosine at positions up to {positions.max():g}; {'a' if side == 'b' else 'b'} has those of base {number(base)}"
    )
    parameters = {"base": base, "dtype": found.dtype, "stage": found.stage, "error": float(f"{error:.3g}")}
    return _cause(tables, summary, side, parameters, sums.share)


def _lows(positions: Float64, columns: int, base: float, dtype: str) -> list[_Low]:
    """Tables in low precision; the cosines are then held in the run's own dtype."""
    found = []
    for grid in GRIDS:
        rates = round_to(_of_base(base, columns), grid)
        angles = round_to(round_to(positions, grid)[:, None] * rates, grid)
        cosines = np.cos(angles)
        for stage, table in (
            ("rates", np.cos(positions[:, None] * rates)),
            ("angles", cosines),
            ("tables", round_to(cosines, grid)),
        ):
            found.append(_Low(grid, stage, round_to(table, dtype) if dtype in GRIDS else table))
    return found


def _cause(tables: _Tables, summary: str, side: str | None, parameters: dict[str, Any], share: float) -> list[Cause]:
    first = tables.first
    if first.name is None or share < SHOWN:
        return []
    return [
        Cause(
            ID, summary, side=side, step=first.step, phase=Phase.FORWARD.label, names=(first.name,), parameters=parameters,
            explains=share,
        )
    ]  # fmt: skip
