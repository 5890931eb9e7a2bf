"""`python -m scenarios.reference A [B …] --output FILE`: recompute traces and write what was measured as JSON.

For `trace diff --reference`, which must not import a framework.  An error is written into the file as well: message and hint.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from differ.command import parse_steps
from differ.options import ENGINE_DTYPES
from scenarios.reference.engine import Options, measure
from tracer.errors import TraceError
from tracer.reader import open_trace


@click.command()
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path))
@click.option("--model")
@click.option("--steps")
@click.option("--reference-dtype", type=click.Choice(ENGINE_DTYPES), default="float32")
def main(traces: tuple[Path, ...], output: Path, model: str | None, steps: str | None, reference_dtype: str) -> None:
    """Recompute TRACES one after another."""
    options = Options(reference_dtype, model, parse_steps(steps))
    try:
        found = []
        for path in traces:
            with open_trace(path) as trace:
                found.append(measure(trace, options).to_json())
    except TraceError as error:
        output.write_text(json.dumps({"error": str(error), "hint": error.hint}), "utf-8")
        sys.exit(error.exit_code)
    output.write_text(json.dumps({"measured": found}, allow_nan=False), "utf-8")


if __name__ == "__main__":
    main()
