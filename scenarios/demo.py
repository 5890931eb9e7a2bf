"""`python -m scenarios.demo`: one LoRA fine-tune on PEFT and twice on mlx-lm, and what `trace diff` says of each pair.

The model is a tiny Gemma-3 with 18 layers, built on the spot.  First mlx-lm runs with its own defaults: it adapts 16 of the
18 layers, at another scale, with another optimizer, on batches that it makes itself.  Then with the settings of the PEFT
run, from its adapters and on its batches.  Ends with 0 if the first pair diverged and the second is the same.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from tracer.errors import TraceError

SAME, DIVERGED = 0, 1
MODEL: Final = "tiny-gemma3-64"
FILES: Final = {
    "run.toml": f"""\
model.name = "{MODEL}"
lora = {{ rank = 8, alpha = 16, layers = "all" }}
train = {{ steps = 10, batch = 2, seed = 0 }}
optimizer = {{ name = "adamw", lr = 1e-3 }}
""",
    "mlx-lm.toml": f"""\
defaults = "mlx-lm"                       # everything that is not given here is as in `mlx_lm lora`
model.name = "{MODEL}"
train = {{ steps = 10, batch = 2 }}
optimizer.lr = 1e-3
""",
}


class DemoFailed(TraceError):
    """A command of the demonstration did not end as it must."""

    slug = "demo-failed"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default=Path("demo-runs"))
def main(folder: Path) -> None:
    """Record and compare in FOLDER (default: demo-runs), which keeps the traces."""
    try:
        run(folder)
    except TraceError as error:
        click.echo(f"trace: {error.line()}", err=True)
        sys.exit(error.exit_code)


def run(folder: Path) -> None:
    """The whole demonstration; raises DemoFailed at the first command with an unexpected exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text, "utf-8")
        click.echo(f"# {name}\n{text}")
    _trace(folder, "record --force -o peft.h5 --path hf-trainer --config run.toml")
    _say("mlx-lm with its own defaults")
    _trace(folder, "record --force -o mlx-lm.h5 --path mlx-lm --config mlx-lm.toml")
    _trace(folder, "diff peft.h5 mlx-lm.h5", expected=DIVERGED)
    _say("mlx-lm with the settings of the PEFT run, from its adapters, on its batches")
    _trace(
        folder, "record --force -o equal.h5 --path mlx-lm --config run.toml --init-from peft.h5 --batches-from peft.h5"
    )
    _trace(folder, "diff peft.h5 equal.h5", expected=SAME)
    _say(f"as it should be: the first pair diverged, the second is the same; the traces are in {folder}")


def _say(text: str) -> None:
    click.echo(f"\n# {text}")


def _trace(folder: Path, command: str, *, expected: int = SAME) -> None:
    """Print `trace COMMAND` and run it in `folder`; what a training library prints is shown only if it fails."""
    click.echo(f"\n$ trace {command}")
    sys.stdout.flush()
    done = _run(folder, shlex.split(command), quiet=command.startswith("record"))
    if done.returncode != expected:
        click.echo((done.stdout or "") + (done.stderr or ""), err=True)
        raise DemoFailed(f"`trace {command}` ended with {done.returncode}, not {expected}")
    for line in (done.stderr or "").splitlines():
        if line.startswith("trace: "):
            click.echo(line)


def _run(folder: Path, arguments: Sequence[str], *, quiet: bool) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parent.parent)  # a checkout that is not installed works too
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "tracer", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=quiet, text=True)


if __name__ == "__main__":
    main()
