"""`python -m scenarios.calibrate`: measure the default tolerances of `trace diff` and write them into differ/defaults.toml.

Pairs of runs that ought to be the same, PyTorch against MLX from shared adapters and batches, over models, seeds and
learning rates, are recorded per dtype and compared record by record.  Each record is a point: its relative error, and
the distance between the two sides' inputs.  The tolerance is the tightest line over all points,

    base + per_input * distance      least mean logarithm among the edges of their upper hull

times a safety factor, rounded up to two digits.  Parameters get a base only: a normalising optimizer turns the noise of a
gradient into parameter noise however close its inputs were.  A point whose tolerance would be 1 or more, or whose inputs
are further apart than the phase's `bound`, is judged by nobody and is left out.  `bound` and the [replay] and [exact]
tables follow from the formats and are not touched; the worst replay margin is written into the header as a check on them.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

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
from tracer.dtypes import BFLOAT16, is_float
from tracer.errors import BadUsage, TraceError
from tracer.names import split_state_name
from tracer.reader import Trace, open_trace
from tracer.schema import TOKEN_LOSS, Phase

MODELS: Final = ("tiny-llama", "tiny-gemma3-64")
SAFETY: Final = 4.0
# In half precision the noise itself is a fifth of a gradient: four times that would judge nothing.
SAFETY_HALF: Final = 2.0
# Judged by the model's inputs, through the engine; the rest is replayed there, so it is measured across sides here.
_MODEL_PHASES: Final = (Phase.FORWARD, Phase.LOSS, Phase.GRAD)
_ACROSS: Final = (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)
_REPLAYED: Final = (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)
# Options of `trace record`: outputs of the modules and losses of the tokens too.
_INSIDE: Final = ("--what", "all", "--token-loss")
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


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and by how much to exceed it."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    models: tuple[str, ...] = MODELS
    seeds: int = 2
    rates: tuple[float, ...] = (1e-4, 2e-3)
    steps: int = 30
    safety: float = SAFETY
    safety_half: float = SAFETY_HALF

    def pairs(self) -> list[dict[str, Any]]:
        """Settings of each pair."""
        return [
            {
                "model.name": model,
                "model.dtype": dtype,
                "train.steps": self.steps,
                "train.seed": seed,
                "data.seed": seed,
                "optimizer.lr": rate,
            }
            for dtype, model, seed, rate in itertools.product(self.dtypes, self.models, range(self.seeds), self.rates)
        ]

    def factor(self, dtype: str) -> float:
        """Safety factor of a dtype."""
        return self.safety_half if dtype in ("float16", BFLOAT16) else self.safety

    def header(self, measured: Measured) -> list[str]:
        """Comment lines that say how the numbers were got; they end with `_END`."""
        given = [f"--{name} {value}" for name, value in self._options()]
        margins = ", ".join(f"{dtype} {margin:.2g}" for dtype, margin in sorted(measured.replay.items()))
        return [
            _START + " ".join(["python -m scenarios.calibrate", *given]),
            f"#   steptrace {VERSION}; {measured.pairs} pairs torch / mlx, shared adapters and batches, {self.steps} steps:",
            f"#   {', '.join(self.models)}; seeds 0–{self.seeds - 1}; lr {', '.join(f'{rate:g}' for rate in self.rates)}",
            f"#   safety factor {self.safety:g}, in half precision {self.safety_half:g}",
            f"#   worst replay margin (of 1): {margins or 'none'}",
            _END,
        ]

    def _options(self) -> Iterator[tuple[str, object]]:
        """Options that differ from the defaults, as on the command line."""
        plain = Plan()
        for name, many in (("dtype", "dtypes"), ("model", "models"), ("lr", "rates")):
            if getattr(self, many) != getattr(plain, many):
                yield from ((name, value) for value in getattr(self, many))
        for name in ("seeds", "steps", "safety", "safety_half"):
            if getattr(self, name) != getattr(plain, name):
                yield name.replace("_", "-"), getattr(self, name)


@click.command()
@click.option("--dtype", "dtypes", multiple=True, default=Plan().dtypes, show_default=True)
@click.option("--model", "models", multiple=True, default=MODELS, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="Number of seeds, from 0.")
@click.option("--lr", "rates", multiple=True, type=float, default=(1e-4, 2e-3), show_default=True)
@click.option("--steps", type=click.IntRange(2), default=30, show_default=True)
@click.option("--safety", type=click.FloatRange(1), default=SAFETY, show_default=True, help="Factor over the measured.")
@click.option(
    "--safety-half", type=click.FloatRange(1), default=SAFETY_HALF, show_default=True, help="In half precision."
)
@click.option("--points", type=click.Path(path_type=Path), help="Keep what was measured here, or use it if it exists.")
@click.option("--output", type=click.Path(path_type=Path), default=DEFAULTS, help="Default: differ/defaults.toml.")
@click.option("--dry-run", is_flag=True, help="Print the table and write nothing.")
def main(output: Path, points: Path | None, dry_run: bool, **options: Any) -> None:
    """Measure the default tolerances on this machine and write them down."""
    plan = Plan(**options)
    try:
        measured = _measure_or_load(plan, points)
    except TraceError as error:
        click.echo(f"trace: {error.line()}", err=True)
        sys.exit(error.exit_code)
    fits = {
        key: fit(found, plan.factor(key[1]), _bound(key), flat=key[0] in _FLAT)
        for key, found in sorted(measured.points.items())
    }
    for (phase, dtype), found in fits.items():
        slope = "-" if found.per_input is None else f"{found.per_input:g}"
        click.echo(f"{phase:<13}{dtype:<9} base {found.base:<8g} per_input {slope:<7} {_comment(found)}")
    if not dry_run:
        output.write_text(rewrite(output.read_text("utf-8"), fits, plan.header(measured)), "utf-8")
        click.echo(f"wrote {output}", err=True)


def _measure_or_load(plan: Plan, file: Path | None) -> Measured:
    """All pairs of the plan; those that `file` holds already are not run again, and each new one is kept in it."""
    key = json.dumps(plan.pairs())
    measured = _load(file, key) if file is not None and file.exists() else Measured()
    for settings in plan.pairs()[measured.pairs :]:
        measure_pair(settings, measured)
        click.echo("measured " + ", ".join(f"{k} {v}" for k, v in settings.items()), err=True)
        if file is not None:
            _save(measured, file, key)
    return measured


def _load(file: Path, key: str) -> Measured:
    kept = json.loads(file.read_text("utf-8"))
    if kept["plan"] != key:
        raise BadUsage(f"{file} was measured with other options", "remove it, or give the options it was made with")
    points: dict[tuple[str, str], list[Point]] = defaultdict(list)
    for phase, dtype, found in kept["points"]:
        points[phase, dtype] = [Point(*pair) for pair in found]
    return Measured(points, kept["replay"], kept["pairs"])


def _save(measured: Measured, file: Path, key: str) -> None:
    found = [[*which, [[p.observed, p.distance] for p in points]] for which, points in measured.points.items()]
    kept = {"plan": key, "points": found, "replay": measured.replay, "pairs": measured.pairs}
    file.write_text(json.dumps(kept), "utf-8")


def measure_pair(settings: Mapping[str, object], into: Measured) -> None:
    """Record torch and mlx with these settings from shared adapters and batches, and add what differs."""
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        first, second = Path(folder, "torch.h5"), Path(folder, "mlx.h5")
        record(Arm("torch", settings), first, _INSIDE)
        record(Arm("mlx", settings, init_from=first, batches_from=first), second, _INSIDE)
        dtype = str(settings["model.dtype"])
        with open_trace(first) as a, open_trace(second) as b:
            for m in _judged(a, b):
                if m.phase in _MODEL_PHASES:
                    # A token's loss has the noise of its logits.
                    label = (Phase.FORWARD if m.name == TOKEN_LOSS else m.phase).label
                    into.points[label, dtype].append(Point(m.observed, m.distance))
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
    """The next number with two significant digits; 0 stays 0."""
    if value <= 0.0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.1e}")


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


if __name__ == "__main__":
    main()
