"""`trace shrink`: a fingerprint of a trace, for a baseline that is kept in git."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tracer.cli.options import Phases, Steps
from tracer.errors import BadUsage
from tracer.schema import Phase


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The fingerprint to write."
)
@click.option("--what", type=Phases(), help="Keep only these phases, with commas; init always stays.")
@click.option(
    "--steps", type=Steps(), help="Keep only these steps: 3, 1:5, :5, 4: (both ends included); step 0 always stays."
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
def shrink(
    file: Path, output: Path, what: frozenset[Phase] | None, steps: tuple[int, int] | None, *, force: bool
) -> None:
    """Replace the tensors of the trace FILE by sketches of them: small enough for git, still good for `trace diff`.

    \b
    trace shrink run.h5 -o golden.h5
    trace shrink run.h5 -o golden.h5 --what loss,grad,param --steps 1:5

    Digests, statistics, settings, losses and small batches stay as they are.  docs/fingerprints.md says what a comparison with
    such a file can no longer see.
    """
    from tracer.reader import open_trace
    from tracer.shrink import shrink as write_fingerprint
    from tracer.size import human_bytes

    if output.exists() and file.exists() and output.samefile(file):
        raise BadUsage(f"{output} is the trace itself", "give the fingerprint another name")
    with open_trace(file) as trace:
        write_fingerprint(trace, output, what=what, steps=steps, overwrite=force)
        before, after = trace.size, output.stat().st_size
    print(
        f"trace: wrote {output}: {human_bytes(after)}, {before / after:.1f} times smaller than {file}", file=sys.stderr
    )
