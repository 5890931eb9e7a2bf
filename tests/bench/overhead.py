"""`python -m tests.bench.overhead`: what recording costs, as a share of a step, and how many bytes a step takes.

Per model and path one process trains alternately without and with the recorder, everything recorded but `forward`, and again with
it.  A run of few steps is subtracted from one of more, so that loading, compiling and step 0 are not counted; the median of the
rounds is kept.  Prints a markdown table; nothing is asserted, as times are the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tracer
from scenarios.models import Tiny, _build, cache_folder
from scenarios.run import run
from tracer.reader import open_trace
from tracer.recorder import DEFAULT_PHASES
from tracer.schema import Phase
from tracer.size import human_bytes

ROOT = Path(__file__).parents[2]
# gemma-3-270m's layers, widths and heads, with a vocabulary of 512 in place of 262,144.
LARGE = Tiny("gemma3-640", "gemma3_text", 18, 640, 4, 1, 2048, 14)
TOKENS = {"tiny-llama": (2, 24), "tiny-gemma3-64": (2, 24), LARGE.name: (2, 64)}
STEPS = {"tiny-llama": (3, 23), "tiny-gemma3-64": (3, 13), LARGE.name: (2, 6)}
PATHS = ("torch", "hf-trainer", "mlx-lm", "mlx")
VARIANTS = ("plain", "recorded", "forward")


@dataclass(frozen=True, slots=True)
class Line:
    """One path on one model: seconds a step per variant, bytes of a step, bytes with `forward`."""

    model: str
    path: str
    seconds: dict[str, float]
    step_bytes: dict[str, float]

    def text(self) -> str:
        plain = self.seconds["plain"]
        cells = [self.model, self.path, f"{1e3 * plain:,.0f} ms"]
        for variant in VARIANTS[1:]:
            cells += [f"{100 * (self.seconds[variant] / plain - 1):+.0f} %", human_bytes(self.step_bytes[variant])]
        return f"| {' | '.join(cells)} |"


def measure(model: str, path: str, rounds: int) -> Line:
    """In a process of its own."""
    command = [sys.executable, "-m", "tests.bench.overhead", "--one", model, path, str(rounds)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Line(model, path, result["seconds"], result["bytes"])


def one(model: str, path: str, rounds: int) -> dict[str, Any]:
    """Times and sizes of a step of each variant."""
    few, many = STEPS[model]
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    sizes: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            train(model, path, few, variant, Path(folder))  # compiles what is compiled
        for _ in range(rounds):
            for variant in VARIANTS:
                short = train(model, path, few, variant, Path(folder))
                long = train(model, path, many, variant, Path(folder))
                times[variant].append((long - short) / (many - few))
                if variant != "plain":
                    sizes[variant] = step_bytes(Path(folder) / "run.h5")
    return {"seconds": {name: statistics.median(found) for name, found in times.items()}, "bytes": sizes}


def train(model: str, path: str, steps: int, variant: str, folder: Path) -> float:
    """Seconds of one run, from the first import to the closed trace."""
    batch, length = TOKENS[model]
    settings = {
        "model.name": str(folder_of(model)), "train.steps": steps, "train.batch": batch, "data.row_length": length,
        "data.rows": batch * many_of(model), "data.variable": "false",
    }  # fmt: skip
    given = tuple(f"{key}={value}" for key, value in settings.items())
    start = time.perf_counter()
    if variant == "plain":
        run(path, None, given)
    else:
        what = DEFAULT_PHASES if variant == "recorded" else frozenset(Phase)
        with tracer.record(folder / "run.h5", what=what, overwrite=True):
            run(path, None, given)
    return time.perf_counter() - start


def many_of(model: str) -> int:
    return STEPS[model][1]


def folder_of(model: str) -> str | Path:
    if model != LARGE.name:
        return model
    folder = cache_folder() / f"{model}-bench"
    if not folder.is_dir():
        _build(LARGE, folder)
    return folder


def step_bytes(path: Path) -> float:
    """Bytes of the last step's rows: tensors, digests and statistics."""
    from tracer.cli.show import _bytes

    with open_trace(path) as trace:
        rows = [row for row in trace.rows() if row.step == trace.last_step]
        return float(sum(_bytes(row) + row.digests.nbytes + row.stats.nbytes for row in rows))


def lines(models: list[str], paths: list[str], rounds: int) -> Iterator[Line]:
    for model in models:
        for path in paths:
            yield measure(model, path, rounds)


def main() -> None:
    """Print the table, a line as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "PATH", "ROUNDS"))
    parser.add_argument("--models", default=",".join(TOKENS))
    parser.add_argument("--paths", default=",".join(PATHS))
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.one:
        model, path, rounds = given.one
        print(json.dumps(one(model, path, int(rounds))))
        return
    print("| model | path | step | recording | bytes a step | with forward | bytes a step |")
    print("|---|---|---|---|---|---|---|")
    for line in lines(given.models.split(","), given.paths.split(","), given.rounds):
        print(line.text(), flush=True)


if __name__ == "__main__":
    main()
