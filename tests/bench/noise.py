"""`python -m tests.bench.noise`: what the noise floor lets pass and what it must not, on real runs.

Per model and dtype, at learning rate 2e-3, 10 steps: PyTorch and MLX from shared adapters and batches, a twin of each with
all weights moved by one rounding unit, and in MLX two faults of 1 %: a learning rate that the settings show, and one that only
the numbers show.  Prints a table and ends with 1 if a row is not as expected.  Two to three minutes a row on one core.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from differ import DiffOptions, DiffResult, diff
from scenarios.launch import Arm
from tracer.schema import Phase

ROOT = Path(__file__).parents[2]
MODELS, DTYPES = ("tiny-llama", "tiny-gemma3-64"), ("float32", "bfloat16")
WITHOUT_HPARAMS = frozenset(Phase) - {Phase.HPARAMS}


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison: what it is, where it must diverge first (empty: same), and what came out."""

    what: str
    expected: str
    result: DiffResult

    @property
    def found(self) -> str:
        first = self.result.first
        return "" if first is None else first.phase

    @property
    def good(self) -> bool:
        return self.found == self.expected

    def text(self) -> str:
        first, worst, counts = self.result.first, self.result.worst, self.result.counts
        said = "same" if first is None else f"step {first.step} {first.phase} ({len(self.result.findings)} findings)"
        margin = (
            ""
            if first is not None or worst is None
            else f", margin {worst.margin:.2f} at step {worst.step} {worst.phase}"
        )
        judged = f"{counts.compared:,} judged, {counts.propagated:,} propagated"
        return f"{'ok ' if self.good else 'BAD'}  {self.what:<55}{said}{margin}; {judged}"


def trace(*arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tracer", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def lines(folder: Path, model: str, dtype: str) -> Iterator[Line]:
    """The comparisons of one model and dtype."""
    settings = {"model.name": model, "model.dtype": dtype, "optimizer.lr": 2e-3, "train.steps": 10}
    torch, mlx, wrong, hidden = (folder / f"{name}.h5" for name in ("torch", "mlx", "wrong", "hidden"))
    shared = Arm("mlx", settings, torch, torch)
    twin = ("--force", "--twins", "1", "--perturb-base")
    trace("record", *twin, "-o", torch, "--path", "torch", *Arm("torch", settings).arguments())
    trace("record", *twin, "-o", mlx, "--path", "mlx", *shared.arguments())
    faster = Arm("mlx", {**settings, "optimizer.lr": 2.02e-3}, torch, torch)
    trace("record", *twin, "-o", wrong, "--path", "mlx", *faster.arguments())
    program = ROOT / "tests" / "programs" / "hidden_lr.py"
    trace("record", "--force", "-o", hidden, "--", "python", program, "mlx", *shared.arguments())

    noise = tuple(path.with_suffix(".twin.h5") for path in (torch, mlx))
    own = (noise[0], wrong.with_suffix(".twin.h5"))
    name = f"{model} {dtype}"
    yield Line(f"{name}: torch, mlx, defaults", "", diff(torch, mlx))
    yield Line(f"{name}: torch, mlx", "", diff(torch, mlx, DiffOptions(noise=noise)))
    yield Line(f"{name}: lr 1 % up", "hparams", diff(torch, wrong, DiffOptions(noise=noise)))
    yield Line(f"{name}: lr 1 % up, its own twin", "hparams", diff(torch, wrong, DiffOptions(noise=own)))
    options = DiffOptions(noise=noise, phases=WITHOUT_HPARAMS)
    yield Line(f"{name}: steps 1 % longer, no hparams", "param", diff(torch, hidden, options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the table; 0 if every row is as expected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    options = parser.parse_args(arguments)
    good = True
    for model in options.model or MODELS:
        for dtype in options.dtype or DTYPES:
            with tempfile.TemporaryDirectory(prefix="noise-") as folder:
                for line in lines(Path(folder), model, dtype):
                    print(line.text(), flush=True)
                    good &= line.good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
