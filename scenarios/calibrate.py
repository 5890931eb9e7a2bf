"""`python -m scenarios.calibrate`: measure the default tolerances of `trace diff` and write them into differ/defaults.toml.

Pairs of runs that ought to be the same, PyTorch against MLX from shared adapters and batches, over models, seeds and
learning rates, are recorded per dtype and compared record by record.  Each record is a point: its relative error, and
the distance between the two sides' inputs.  The tolerance is the tightest line over all points,

    base + per_input * distance      least mean logarithm among the edges of their upper hull

times a safety factor, rounded up to one digit.  Parameters get a base only: a normalising optimizer turns the noise of a
gradient into parameter noise however close its inputs were.  A point whose tolerance would be 1 or more, or whose inputs
are further apart than the phase's `bound`, is judged by nobody and is left out.  `bound` and the [replay] and [exact]
tables follow from the formats and are not touched; the worst replay margin is written into the header as a check on them.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import click
import numpy as np

from differ import DiffOptions, diff
from differ.align import Rows
from differ.compare import distance
from differ.inputs import Inputs
from differ.judges.model import input_distance
from differ.options import Measurement
from differ.policy import DEFAULTS, Tolerance, default_policy
from scenarios.launch import Arm, record
from tracer._version import VERSION
from tracer.dtypes import is_float
from tracer.errors import TraceError
from tracer.names import split_state_name
from tracer.reader import Trace, open_trace
from tracer.schema import Phase

MODELS: Final = ("tiny-llama", "tiny-gemma3-64")
SAFETY: Final = 4.0
# Judged by the model's inputs, through the engine; the rest is replayed there, so it is measured across sides here.
_MODEL_PHASES: Final = (Phase.LOSS, Phase.GRAD)
_ACROSS: Final = (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)
_REPLAYED: Final = (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)
_FLAT: Final = (Phase.PARAM.label,)
# An evaluation is a loss.
_SAME_AS: Final = {"eval": "loss"}
_START, _END = "# Measured: ", "# (end of what was measured)"


@dataclass(frozen=True, slots=True)
class Point:
    """One record of one pair: relative error, and how far apart its inputs were."""

    observed: float
    distance: float


@dataclass(slots=True)
class Measured:
    """All points by (phase, dtype), and the worst margin of a replay by dtype."""

    points: dict[tuple[str, str], list[Point]] = field(default_factory=lambda: defaultdict(list))
    replay: dict[str, float] = field(default_factory=dict)
    pairs: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """Tolerance of one table, what was measured for it, and how many points it rests on."""

    base: float
    per_input: float | None
    measured_base: float
    measured_slope: float
    points: int


@click.command()
@click.option("--dtype", "dtypes", multiple=True, default=("float32", "bfloat16", "float16"), show_default=True)
@click.option("--model", "models", multiple=True, default=MODELS, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="Number of seeds, from 0.")
@click.option("--lr", "rates", multiple=True, type=float, default=(1e-4, 2e-3), show_default=True)
@click.option("--steps", type=click.IntRange(2), default=10, show_default=True)
@click.option("--safety", type=click.FloatRange(1), default=SAFETY, show_default=True, help="Factor over the measured.")
@click.option("--output", type=click.Path(path_type=Path), default=DEFAULTS, help="Default: differ/defaults.toml.")
@click.option("--dry-run", is_flag=True, help="Print the table and write nothing.")
def main(
    dtypes: tuple[str, ...],
    models: tuple[str, ...],
    seeds: int,
    rates: tuple[float, ...],
    steps: int,
    safety: float,
    output: Path,
    dry_run: bool,
) -> None:
    """Measure the default tolerances on this machine and write them down."""
    try:
        measured = Measured()
        for dtype, model, seed, rate in itertools.product(dtypes, models, range(seeds), rates):
            settings = {
                "model.name": model,
                "model.dtype": dtype,
                "train.steps": steps,
                "train.seed": seed,
                "data.seed": seed,
                "optimizer.lr": rate,
            }
            measure_pair(settings, measured)
            click.echo(f"measured {dtype} {model} seed {seed} lr {rate:g}", err=True)
    except TraceError as error:
        click.echo(f"trace: {error.line()}", err=True)
        sys.exit(error.exit_code)
    fits = {k: fit(v, safety, _bound(k), flat=k[0] in _FLAT) for k, v in sorted(measured.points.items())}
    for (phase, dtype), found in fits.items():
        slope = "-" if found.per_input is None else f"{found.per_input:g}"
        click.echo(f"{phase:<13}{dtype:<9} base {found.base:<7g} per_input {slope:<6} {_comment(found)}")
    arguments = " ".join(sys.argv[1:])
    header = _header(
        f"python -m scenarios.calibrate {arguments}".strip(), measured, models, seeds, rates, steps, safety
    )
    if not dry_run:
        output.write_text(rewrite(output.read_text("utf-8"), fits, header), "utf-8")
        click.echo(f"wrote {output}", err=True)


def measure_pair(settings: Mapping[str, object], into: Measured) -> None:
    """Record torch and mlx with these settings from shared adapters and batches, and add what differs."""
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        first, second = Path(folder, "torch.h5"), Path(folder, "mlx.h5")
        record(Arm("torch", settings), first)
        record(Arm("mlx", settings, init_from=first, batches_from=first), second)
        dtype = str(settings["model.dtype"])
        with open_trace(first) as a, open_trace(second) as b:
            for m in _judged(a, b):
                if m.phase in _MODEL_PHASES:
                    into.points[m.phase.label, dtype].append(Point(m.observed, m.distance))
                elif m.phase in _REPLAYED and m.step > 0:
                    into.replay[m.dtype] = max(into.replay.get(m.dtype, 0.0), m.observed)
            for phase, point in across(a, b):
                into.points[phase.label, dtype].append(point)
    into.pairs += 1


def _judged(a: Trace, b: Trace) -> list[Measurement]:
    """What the engine measures, with tolerances so wide that nothing is cut short by a divergence."""
    policy = default_policy()
    wide = {key: replace(t, base=0.999, per_input=0.0, bound=math.inf) for key, t in policy.tables.items()}
    found: list[Measurement] = []
    diff(a, b, DiffOptions(policy=replace(policy, tables=wide), probe=found.append))
    return found


def across(a: Trace, b: Trace) -> Iterator[tuple[Phase, Point]]:
    """Relative error and distance of the inputs of every float record of the phases that the engine replays."""
    rows = Rows(a), Rows(b)
    inputs, anything = Inputs(*rows), Tolerance(0.0)
    for step, phase in itertools.product([step for step in a.steps if step > 0], _ACROSS):
        x, y = (side.get(phase, step) for side in rows)
        if x is None or y is None:
            continue
        floats = [n for n in x.positions if n in y.positions and is_float(x.entry(n).dtype)]
        for name in (n for n in floats if x.state(n) is y.state(n)):
            parameter = split_state_name(name)[0] if phase is Phase.OPT_STATE else name
            apart = input_distance(phase, parameter, inputs.before(step), anything)
            yield phase, Point(distance(x.read(name), y.read(name)).rel_l2(), apart)


def fit(points: Iterable[Point], safety: float, bound: float, *, flat: bool = False) -> Fit:
    """Tolerance that every point passes by the safety factor; `flat`: whatever the distance of its inputs."""
    inside = [point for point in points if point.distance <= bound and point.observed * safety < 1.0]
    base, slope = tightest_line([replace(p, distance=0.0) for p in inside] if flat else inside)
    return Fit(round_up(safety * base), None if flat else round_up(safety * slope), base, slope, len(inside))


def tightest_line(points: Sequence[Point]) -> tuple[float, float]:
    """(base, slope), neither negative, of the line over all points with the least mean logarithm; (0, 0) without any."""
    hull = _upper_hull(points)
    if not hull:
        return 0.0, 0.0
    lines = [(max(point.observed for point in hull), 0.0)]
    for left, right in itertools.pairwise(hull):
        slope = (right.observed - left.observed) / (right.distance - left.distance)
        lines.append((left.observed - slope * left.distance, slope))
    usable = [(base, slope) for base, slope in lines if base > 0.0 and slope >= 0.0]
    distances = np.array([point.distance for point in points])
    return min(usable, key=lambda line: float(np.log(line[0] + line[1] * distances).mean()), default=(0.0, 0.0))


def _upper_hull(points: Sequence[Point]) -> list[Point]:
    """Corners of the upper convex hull by distance, one point a distance."""
    highest: dict[float, Point] = {}
    for point in points:
        if point.observed >= highest.get(point.distance, point).observed:
            highest[point.distance] = point
    hull: list[Point] = []
    for point in sorted(highest.values(), key=lambda p: p.distance):
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _turns_up(a: Point, b: Point, c: Point) -> bool:
    """Whether b is not above the line from a to c."""
    return (b.observed - a.observed) * (c.distance - a.distance) <= (c.observed - a.observed) * (
        b.distance - a.distance
    )


def round_up(value: float) -> float:
    """The next number with one significant digit; 0 stays 0."""
    if value <= 0.0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(value))
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.0e}")


def _bound(key: tuple[str, str]) -> float:
    phase, dtype = key
    return default_policy().tolerance(Phase.parse(phase), dtype, "").bound


def rewrite(text: str, fits: Mapping[tuple[str, str], Fit], header: Sequence[str]) -> str:
    """The file with `base` and `per_input` of the measured tables replaced, and the header that says how."""
    fits = {**fits, **{(x, d): f for x, y in _SAME_AS.items() for (p, d), f in fits.items() if p == y}}
    lines: list[str] = []
    table: Fit | None = None
    for line in _without_header(text.splitlines()):
        heading = re.fullmatch(r"\[(\w+)\.(\w+)\]", line.strip())
        if line.startswith("[") and not any(old.startswith("[") for old in lines):
            lines += [*header, ""]
        if line.startswith("["):
            table = fits.get((heading[1], heading[2])) if heading else None
        lines.append(_replaced(line, table) if table is not None else line)
    return "\n".join(lines) + "\n"


def _without_header(lines: Sequence[str]) -> list[str]:
    starts = [i for i, line in enumerate(lines) if line.startswith(_START)]
    ends = [i for i, line in enumerate(lines) if line == _END]
    if not starts or not ends:
        return list(lines)
    return [*lines[: starts[0]], *lines[ends[-1] + 2 :]]


def _replaced(line: str, found: Fit) -> str:
    if re.match(r"base\s*=", line):
        return f"base = {found.base:g}  # measured {found.measured_base:.1e}"
    if re.match(r"per_input\s*=", line) and found.per_input is not None:
        return f"per_input = {found.per_input:g}  # measured {found.measured_slope:.1e}"
    return line


def _comment(found: Fit) -> str:
    return f"measured {found.measured_base:.1e}, {found.measured_slope:.1e} ({found.points} records)"


def _header(
    command: str,
    measured: Measured,
    models: Sequence[str],
    seeds: int,
    rates: Sequence[float],
    steps: int,
    safety: float,
) -> list[str]:
    margins = ", ".join(f"{dtype} {margin:.2g}" for dtype, margin in sorted(measured.replay.items()))
    return [
        f"{_START}{command}",
        f"#   steptrace {VERSION}; {measured.pairs} pairs torch / mlx, shared adapters and batches, {steps} steps each:",
        f"#   {', '.join(models)}; seeds 0–{seeds - 1}; lr {', '.join(f'{rate:g}' for rate in rates)}",
        f"#   safety factor {safety:g}; worst replay margin (of 1): {margins or 'none'}",
        _END,
    ]


if __name__ == "__main__":
    main()
