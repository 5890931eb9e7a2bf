"""What writing costs: a step of 252 LoRA tensors in five phases, packed, against one dataset per tensor and a raw file.

    python -m tests.bench.writing [--size tiny|270m] [--steps N]

All layouts in one process, round-robin, medians; read the ratios, not the milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from tracer.schema import WHOLE_STEP, Phase, Record, Row
from tracer.writer import TraceWriter

PHASES = (Phase.GRAD, Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM, Phase.EVAL)
SIZES = {"tiny": (64, 256), "270m": (640, 2048)}


def tensors(size: str) -> dict[str, np.ndarray]:
    """252 LoRA factors of rank 8: seven modules of 18 layers."""
    hidden, inner = SIZES[size]
    rng = np.random.default_rng(0)
    widths = {"q": (hidden, hidden), "k": (hidden, 256), "v": (hidden, 256), "o": (hidden, hidden)}
    widths |= {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    shapes = {}
    for layer in range(18):
        for module, (fan_in, fan_out) in widths.items():
            shapes[f"layers.{layer}.{module}.lora_A.weight"] = (8, fan_in)
            shapes[f"layers.{layer}.{module}.lora_B.weight"] = (fan_out, 8)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def rows(step: int, data: dict[str, np.ndarray]) -> list[Row]:
    records = tuple(Record(name, array, "float32", array.shape) for name, array in data.items())
    return [Row(phase, step, WHOLE_STEP, records) for phase in PHASES[:4]] + [
        Row(Phase.HPARAMS, step, WHOLE_STEP, records)
    ]


def measure(size: str, steps: int) -> dict[str, float]:
    """Median milliseconds a step of each way to write."""
    data = tensors(size)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = TraceWriter(Path(folder) / "packed.h5", env={}, declared={})
        naive = h5py.File(Path(folder) / "naive.h5", "w")
        raw = (Path(folder) / "raw.bin").open("wb")

        def packed(step: int) -> None:
            writer.write_step(step, rows(step, data))

        def per_tensor(step: int) -> None:
            for phase in PHASES:
                for name, array in data.items():
                    naive.create_dataset(f"{step}/{phase.label}/{name}", data=array)
            naive.flush()

        def raw_file(step: int) -> None:
            for _ in PHASES:
                for array in data.values():
                    raw.write(array.data)
            raw.flush()

        ways: dict[str, Callable[[int], None]] = {
            "packed, digests and statistics": packed,
            "one dataset per tensor": per_tensor,
            "raw file": raw_file,
        }
        for step in range(1, steps + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way(step)
                times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
        writer.finish()
        naive.close()
        raw.close()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    result = measure(options.size, options.steps)
    best = min(result.values())
    for name, milliseconds in result.items():
        print(f"{name:<32}{milliseconds:9.1f} ms/step  x{milliseconds / best:.1f}")


if __name__ == "__main__":
    main()
