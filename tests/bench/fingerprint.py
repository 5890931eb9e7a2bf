"""How well a sketch estimates the distance of two tensors: `python -m tests.bench.fingerprint TRACE`, how large a trace's
fingerprint is: `python -m tests.bench.fingerprint --sizes TRACE`, and which planted faults a comparison with a fingerprint finds:
`python -m tests.bench.fingerprint --faults`.

TRACE is a recording with tensors; those of `grad` and `param` of its last step are perturbed, each in one way, and the ratio of
the estimated to the true L2 distance is printed as a markdown table (5th percentile, median, 95th), with the share of tensors
that read below half, and what the L2 norm alone shows.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from differ import Finding, diff
from tests.builders import FAULTS, make_trace
from tracer.dtypes import bf16_to_float32, float32_to_bf16, to_float64
from tracer.reader import open_trace
from tracer.schema import Phase
from tracer.shrink import shrink
from tracer.sketch import sketch, sketch_distance

Array = np.ndarray
Change = Callable[[Array, np.random.Generator], Array]


def noise(size: float) -> Change:
    """Gaussian noise of a relative size."""

    def change(x: Array, rng: np.random.Generator) -> Array:
        delta = rng.normal(size=x.shape)
        return x + delta * (size * np.linalg.norm(x) / np.linalg.norm(delta))

    return change


def flip_row(x: Array, rng: np.random.Generator) -> Array:
    """Another sign in one row."""
    y = x.copy()
    y[int(rng.integers(len(y)))] *= -1
    return y


def permute(x: Array, rng: np.random.Generator) -> Array:
    """All elements in another order."""
    return rng.permutation(x.reshape(-1)).reshape(x.shape)


def transpose(x: Array, rng: np.random.Generator) -> Array:
    """The transpose's elements in the tensor's shape."""
    return np.ascontiguousarray(x.T).reshape(x.shape)


def element(size: float) -> Change:
    """One element moved by a share of the largest."""

    def change(x: Array, rng: np.random.Generator) -> Array:
        y = x.copy()
        y.reshape(-1)[int(rng.integers(y.size))] += size * np.abs(x).max()
        return y

    return change


def bf16(x: Array, rng: np.random.Generator) -> Array:
    """Rounded to bfloat16."""
    return bf16_to_float32(float32_to_bf16(x)).astype(np.float64)


CHANGES: dict[str, Change] = {
    **{f"noise {size:g}": noise(size) for size in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)},
    "scale × (1 + 1e-4)": lambda x, rng: x * (1 + 1e-4),
    "scale × (1 + 1e-6)": lambda x, rng: x * (1 + 1e-6),
    "sign of one row": flip_row,
    "permutation": permute,
    "transpose": transpose,
    "one element += max": element(1.0),
    "one element += 1e-3 max": element(1e-3),
    "one element += 1e-6 max": element(1e-6),
    "rounded to bfloat16": bf16,
    "largest 1 % clipped": lambda x, rng: np.clip(x, *np.quantile(x, [0.005, 0.995])),
    "row × 1.001": lambda x, rng: x * np.where(np.arange(len(x)) == len(x) // 2, 1.001, 1.0)[:, None],
}


def tensors(path: str) -> Iterator[Array]:
    """Matrices of `grad` and `param` at the last step that are not zero, as float64."""
    with open_trace(path) as trace:
        for phase in (Phase.GRAD, Phase.PARAM):
            row = trace.row(phase, trace.last_step)
            assert row is not None
            for i, entry in enumerate(row.layout.entries):
                if len(entry.shape) == 2 and row.stored(i):
                    values = to_float64(row.read(i), entry.dtype)
                    if values.any():
                        yield values


def main(path: str) -> None:
    """Print the table."""
    matrices = list(tensors(path))
    sizes = [matrix.size for matrix in matrices]
    print(f"{len(matrices)} matrices of {min(sizes)} to {max(sizes)} elements\n")
    print("| change | true relative L2 | estimate / true: 5 % | 50 % | 95 % | below half | change of the L2 norm |")
    print("|---|---|---|---|---|---|---|")
    for name, change in CHANGES.items():
        rng = np.random.default_rng(0)
        ratios, true, norms = [], [], []
        for x in matrices:
            y = change(x, rng)
            distance, norm = float(np.linalg.norm(x - y)), float(np.linalg.norm(x))
            if distance == 0.0:
                continue
            ratios.append(sketch_distance(sketch(x, "float64"), sketch(y, "float64")) / distance)
            true.append(distance / norm)
            norms.append(abs(float(np.linalg.norm(y)) - norm) / norm)
        low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
        below = float(np.mean(np.array(ratios) < 0.5))
        print(
            f"| {name} | {np.median(true):.1e} | {low:.2f} | {middle:.2f} | {high:.2f} | {below:.1%} | {np.median(norms):.1e} |"
        )


def faults() -> None:
    """Print what a full comparison and one with a fingerprint find of each fault of the synthetic runs."""
    print("| planted fault | with tensors | with a fingerprint |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        clean, golden = make_trace(Path(folder, "a.h5")), Path(folder, "golden.h5")
        with open_trace(clean) as trace:
            shrink(trace, golden)
        for fault in FAULTS:
            other = make_trace(Path(folder, "b.h5"), fault=fault)
            found = [_found(diff(baseline, other).first) for baseline in (clean, golden)]
            print(f"| {fault} | {found[0]} | {found[1]} |")


# What a small fingerprint keeps, as `trace shrink --what … --steps …` has it.
SMALL = "loss,batch,hparams,grad,param"


def sizes(path: str) -> None:
    """Print the size of a trace, of its fingerprint, and of one with fewer phases and steps, in bytes."""
    print(f"| file | bytes |\n|---|---|\n| trace | {Path(path).stat().st_size:,} |")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "golden.h5")
        for title, options in (("", []), (f", `--what {SMALL} --steps :5`", ["--what", SMALL, "--steps", ":5"])):
            command = [sys.executable, "-m", "tracer", "shrink", path, "-o", str(out), "--force", *options]
            subprocess.run(command, check=True, capture_output=True)
            print(f"| fingerprint{title} | {out.stat().st_size:,} |")


def _found(first: Finding | None) -> str:
    return "same" if first is None else f"step {first.step}, {first.phase}"


if __name__ == "__main__":
    if sys.argv[1] == "--faults":
        faults()
    elif sys.argv[1] == "--sizes":
        sizes(sys.argv[2])
    else:
        main(sys.argv[1])
