"""Program: record several arms of one path, one after another in one process.

    python -m tests.bench.accuracy.program PATH ARMS.json

An arm is {"settings", "trace", "init_from", "batches_from", "plan", "twin", "inside",
"modules"}.  Importing a framework takes longer than
training a tiny model, so arms share a process; each has a recorder of its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import tracer
from scenarios.run import run
from tests.bench.accuracy.plants import planted
from tracer.perturb import Perturbation
from tracer.reader import open_trace
from tracer.schema import Phase

# What an arm is recorded with that asks for what is inside a step too.
INSIDE: dict[str, Any] = {"what": frozenset(Phase), "token_loss": True, "micro_grads": True}


def record(path: str, arm: dict[str, Any]) -> None:
    """Record one arm; its trace appears under its name when it is whole."""
    settings = tuple(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in arm["settings"].items())
    shared = {key: Path(arm[key]) if arm.get(key) else None for key in ("init_from", "batches_from")}
    final, written = Path(arm["trace"]), Path(arm["trace"]).with_suffix(".part")
    twin = Perturbation("rounding", arm["twin"]) if arm.get("twin") else None
    options = {**INSIDE, "modules": tuple(arm["modules"])} if arm.get("inside") else {}
    with tracer.record(written, overwrite=True, twin=twin, **options), planted(path, arm["plan"]):
        run(path, None, settings, **shared)
    with open_trace(written) as trace:
        steps = int(trace.declared["train.steps"])
        if not trace.finished or trace.last_step != steps:
            raise RuntimeError(f"{final.name}: {trace.last_step} of {steps} steps recorded: {trace.end}")
    os.replace(written, final)


if __name__ == "__main__":
    for given in json.loads(Path(sys.argv[2]).read_text("utf-8")):
        record(sys.argv[1], given)
