"""`python -m tests.bench.reference`: two frameworks run free for 30 steps, and the MLX trace against the torch reference.

Per tiny model and seed: a PyTorch run, an MLX run from its adapters and batches, the verdict on the two, and how far each step's
worst gradient is from the other side's and from the reference.  Prints the tables of docs/reference.md as markdown; ends with
1 if a pair is not the same, or the reference's error grows.  Some ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from differ import DiffOptions, DiffResult, diff
from differ.options import Measurement
from differ.policy import default_policy
from differ.reference import ReferenceSide, judge, recompute
from tracer.schema import Phase

ROOT = Path(__file__).parents[2]
MODELS = ("tiny-llama", "tiny-gemma3-64")
# The last third of the steps may be this many times as far from the reference as the first before it counts as growth.
GROWTH = 2.0


@dataclass(frozen=True, slots=True)
class Pair:
    """One model and seed: the verdict on the two runs, and the worst gradient of each step, across and by the reference."""

    model: str
    seed: int
    result: DiffResult
    across: dict[int, float]
    reference: ReferenceSide

    @property
    def against(self) -> dict[int, float]:
        return {step.step: step.worst for step in self.reference.steps}

    @property
    def good(self) -> bool:
        return self.result.verdict.value == "same" and self.reference.follows and growth(self.against) < GROWTH


def growth(errors: dict[int, float]) -> float:
    """Largest error of the last third of the steps over that of the first third."""
    steps = sorted(errors)
    third = max(1, len(steps) // 3)
    return max(errors[s] for s in steps[-third:]) / max(errors[s] for s in steps[:third])


def run(path: str, settings: dict[str, object], trace: Path, source: Path | None, folder: Path) -> None:
    arms, results = folder / "arms.json", folder / "results.json"
    given = {"init_from": source, "batches_from": source} if source else {}
    arms.write_text(json.dumps({"run": {"settings": settings, "trace": trace, **given}}, default=str))
    command = [sys.executable, "-W", "ignore", "-m", "tests.scenarios.many", path, str(arms), str(results)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or "error" in json.loads(results.read_text())["run"]:
        raise SystemExit(done.stderr[-2000:] or results.read_text())


def pair(model: str, seed: int, steps: int) -> Pair:
    settings = {
        "model.name": model,
        "train.steps": steps,
        "train.seed": seed,
        "data.seed": seed,
        "data.rows": 2 * steps,
    }
    across: dict[int, float] = {}

    def probe(one: Measurement) -> None:
        if one.phase is Phase.GRAD:
            across[one.step] = max(across.get(one.step, 0.0), one.observed)

    with tempfile.TemporaryDirectory(prefix="reference-") as name:
        folder = Path(name)
        torch, mlx = folder / "torch.h5", folder / "mlx.h5"
        run("torch", settings, torch, None, folder)
        run("mlx", settings, mlx, torch, folder)
        result = diff(torch, mlx, DiffOptions(probe=probe))
        measured = recompute([mlx])[0]
    return Pair(model, seed, result, across, judge(measured, default_policy()))


def verdicts(pairs: Sequence[Pair]) -> str:
    lines = [
        "| model | seed | free-running | worst of tolerance | reference | worst gradient | last third / first third |",
        "|---|--:|---|--:|---|--:|--:|",
    ]
    for one in pairs:
        first = one.result.first
        where = "" if first is None else f" at step {first.step} {first.phase} {first.name}"
        lines.append(
            f"| {one.model} | {one.seed} | {one.result.verdict.value}{where} | {one.result.margin:.2f} "
            f"| {one.reference.verdict} | {max(one.against.values()):.1e} | {growth(one.against):.2f} |"
        )
    return "\n".join(lines)


def by_step(pairs: Sequence[Pair]) -> str:
    """The worst over the seeds, step by step."""
    models = list(dict.fromkeys(one.model for one in pairs))
    head = "".join(f" {model}: MLX against PyTorch | MLX against the reference |" for model in models)
    lines = [f"| step |{head}", f"|--:|{'--:|' * 2 * len(models)}"]
    for step in sorted(pairs[0].against):
        cells = []
        for model in models:
            of = [one for one in pairs if one.model == model]
            cells += [max(one.across.get(step, 0.0) for one in of), max(one.against[step] for one in of)]
        lines.append(f"| {step} | " + " | ".join(f"{cell:.1e}" for cell in cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0 if every pair is the same and no error grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args(arguments)
    pairs = []
    for model in options.model or MODELS:
        for seed in range(options.seeds):
            pairs.append(pair(model, seed, options.steps))
            print(verdicts(pairs[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    print(f"{verdicts(pairs)}\n\n{by_step(pairs)}")
    return 0 if all(one.good for one in pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
