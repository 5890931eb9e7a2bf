"""`trace calibrate RUN TWIN…`: a policy file from a run's own noise, and how often it would have been wrong."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import click

from differ.calibrate import Calibration
from tracer.errors import BadUsage, NoPermission, NotFound


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("twins", type=click.Path(path_type=Path), nargs=-1)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The policy to write."
)
@click.option(
    "--safety",
    type=click.FloatRange(1.0),
    help="Factor over what was measured (default: 4, in float16 and bfloat16 2).",
)
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def calibrate(run: Path, twins: tuple[Path, ...], output: Path, safety: float | None, *, force: bool) -> None:
    """Write tolerances that fit the noise of the trace RUN, measured by two or more of its TWINS.

    \b
    trace record --twins 3 --perturb-base -o run.h5 -- python train.py
    trace calibrate run.h5 run.twin.h5 run.twin-2.h5 run.twin-3.h5 -o policy.toml
    trace diff run.h5 other.h5 --policy policy.toml

    Prints the tolerances and, for each twin left out in turn, how many of its records those fitted to the others would have
    called different.  Exit code: 0, or 2 for files that are no twins.
    """
    from differ.calibrate import calibrate as fit
    from tracer.reader import open_trace

    if output.exists() and not force:
        raise BadUsage(f"{output} exists", "give --force to replace it")
    with ExitStack() as stack:
        traces = [stack.enter_context(open_trace(path)) for path in (run, *twins)]
        found = fit(traces[0], traces[1:], safety)
    for line in _lines(found):
        click.echo(line)
    _write(output, found, run, twins, safety)


def _lines(found: Calibration) -> Iterator[str]:
    yield f"{'phase':<13}{'dtype':<10}{'base':>9}{'per_input':>11}{'bound':>9}{'records':>10}"
    for (phase, dtype), t in found.tolerances.items():
        row = f"{phase.label:<13}{dtype:<10}{t.base:>9.2g}{t.per_input:>11.2g}{t.bound:>9.2g}"
        yield f"{row}{found.points[phase, dtype]:>10,}"
    yield ""
    for check in found.checks:
        yield f"left out {check.name}: {check.alarms:,} false alarms in {check.judged:,} records, {check.unjudged:,} not judged"
    yield summary(found)


def summary(found: Calibration) -> str:
    """The false-alarm rate in one sentence."""
    judged, alarms = (sum(getattr(check, what) for check in found.checks) for what in ("judged", "alarms"))
    clean = sum(check.alarms == 0 for check in found.checks)
    rate = alarms / judged if judged else math.nan
    return f"false alarms, leaving one out: {rate:.2g} a record; {clean} of {len(found.checks)} twins without any"


def _write(output: Path, found: Calibration, run: Path, twins: tuple[Path, ...], safety: float | None) -> None:
    from differ.calibrate import policy_text

    how = [
        f"trace calibrate {run.name} {' '.join(twin.name for twin in twins)}"
        + ("" if safety is None else f" --safety {safety:g}"),
        summary(found),
    ]
    try:
        output.write_text(policy_text(found, how, lambda key: f"{found.points[key]:,} records"), encoding="utf-8")
    except PermissionError as error:
        raise NoPermission(f"{output} cannot be written", "choose another folder") from error
    except OSError as error:
        raise NotFound(f"{output} cannot be written: {error.strerror or error}", "check the folder") from error
    print(f"trace: wrote {output}: {len(found.tolerances)} tables", file=sys.stderr)
