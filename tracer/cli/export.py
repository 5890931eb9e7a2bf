"""`trace export`: curves for TensorBoard, or the tensors of a step as .npz or safetensors."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from tracer.errors import BadUsage
from tracer.schema import Phase


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A log folder (default: runs/NAME), or with --step a .npz or .safetensors file.",
)
@click.option("--step", type=click.IntRange(min=0), help="Export the tensors of this step instead of curves.")
@click.option("--phase", "label", metavar="PHASE", help="With --step: whose tensors (default: param, at step 0 init).")
@click.option("--micro-batch", type=click.IntRange(min=0), help="With --step: which one, of a phase that has several.")
@click.option("--force", is_flag=True, help="Replace the output file if it exists.")
def export(
    file: Path, output: Path | None, step: int | None, label: str | None, micro_batch: int | None, *, force: bool
) -> None:
    """Export the trace FILE: loss, norms and settings as TensorBoard scalars, or with --step the tensors of a step.

    \b
    trace export run.h5 -o runs/run
    trace export run.h5 --step 10 --phase param -o adapter.safetensors
    trace export run.h5 --step 1 --phase grad -o grad.npz

    Names and layout are canonical: those of the Hugging Face checkpoint.
    """
    from tracer.export import to_file, to_tensorboard
    from tracer.reader import open_trace

    with open_trace(file) as trace:
        if step is None:
            if label is not None or micro_batch is not None:
                raise BadUsage(
                    "--phase and --micro-batch need --step", "without it the curves of all steps are exported"
                )
            folder = output if output is not None else Path("runs") / file.stem
            count = to_tensorboard(trace, folder)
            print(f"trace: wrote {count} points to {folder}; tensorboard --logdir {folder}", file=sys.stderr)
            return
        if output is None:
            raise BadUsage("no output was given", "-o step.npz or -o step.safetensors")
        if output.exists() and not force:
            raise BadUsage(f"{output} exists already", "choose another name, or --force to replace it")
        phase = _phase(label or ("param" if step else "init"))
        count = to_file(trace, output, phase=phase, step=step, micro_batch=micro_batch)
    print(f"trace: wrote {count} tensors to {output}", file=sys.stderr)


def _phase(label: str) -> Phase:
    try:
        return Phase.parse(label)
    except KeyError as error:
        raise BadUsage(f"{label!r} is no phase", f"phases are {', '.join(phase.label for phase in Phase)}") from error
