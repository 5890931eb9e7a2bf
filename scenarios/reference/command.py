"""`trace verify F`: does every recorded step follow from its own inputs, as a reference in torch recomputes it?

Runs the reference in this process.  The verdict's word is the first of the report, and the exit code: 0 follows, 1 does not,
2 cannot be answered.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from differ.command import parse_steps
from differ.options import ENGINE_DTYPES, ENGINES
from differ.policy import default_policy, load_policy
from differ.reference import Measured, ReferenceSide, judge
from differ.terminal import progress
from tracer._version import DISTRIBUTION, VERSION
from tracer.reader import open_trace

FORMAT = 1


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--model", metavar="FOLDER|ID", help="Base model, where it is not the one that the trace names.")
@click.option("--steps", metavar="A:B", help="Recompute steps A to B only; `3` is one step, `:5` up to 5.")
@click.option("--reference", type=click.Choice(ENGINES), default="torch", show_default=True, help="What recomputes.")
@click.option(
    "--reference-dtype", type=click.Choice(ENGINE_DTYPES), default="float32", show_default=True, help="In which dtype."
)
@click.option("--policy", type=click.Path(path_type=Path), help="TOML file with tolerances over the defaults.")
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def verify(
    file: Path,
    model: str | None,
    steps: str | None,
    reference: str,  # noqa: ARG001 - there is one
    reference_dtype: str,
    policy: Path | None,
    form: str,
) -> int:
    """Recompute loss and gradients of every recorded step of FILE from its own parameters and batch, and compare.

    Works for traces of any framework.  Says at which step, phase and name the trace stops following the reference.

    \b
    Example:
      trace verify mlx.h5
      trace verify mlx.h5 --steps 1:3 --model ./gemma-3-270m --format json

    Exit code: 0 follows, 1 does not follow, 2 no answer (another base, dropout that cannot be drawn again, a phase missing).
    """
    from scenarios.reference.engine import Options, measure
    from scenarios.reference.report import render

    chosen = load_policy(policy) if policy is not None else default_policy()
    with open_trace(file) as trace, progress("recomputing") as report:
        measured = measure(trace, Options(reference_dtype, model, parse_steps(steps), report))
    side = judge(measured, chosen)
    click.echo(as_json(measured, side) if form == "json" else render(measured, side), nl=False)
    return 0 if side.follows else 1


def as_json(measured: Measured, side: ReferenceSide) -> str:
    """What was measured and what it is judged to be, as JSON text: sorted keys, non-finite numbers as strings."""
    body = {
        "format": FORMAT,
        "tool": {"name": DISTRIBUTION, "version": VERSION},
        "trace": measured.trace,
        "label": measured.label,
        "errors": {str(step["step"]): step for step in measured.to_json()["steps"]},
        **_finite(asdict(side)),
    }
    return json.dumps(body, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value != value:
        return "nan"
    return str(value) if isinstance(value, float) and value in (float("inf"), float("-inf")) else value
