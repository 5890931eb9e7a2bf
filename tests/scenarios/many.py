"""Program: several runs of one training path, one after another in one process, recorded or not.

    python -m tests.scenarios.many PATH ARMS.json RESULTS.json

Importing a framework takes longer than training a tiny model, so the tests share it.  Each result is the run's outcome, or
the error as the user would read it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import tracer
from scenarios.run import run
from tracer.errors import TraceError
from tracer.schema import Phase

# What an arm is recorded with that asks for what is inside a step too.
INSIDE: dict[str, Any] = {"what": frozenset(Phase), "token_loss": True, "micro_grads": True}


def one(path: str, arm: dict[str, Any]) -> dict[str, Any]:
    settings = tuple(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in arm["settings"].items())
    shared = {name: Path(arm[name]) if arm.get(name) else None for name in ("init_from", "batches_from")}
    options = INSIDE if arm.get("inside") else {}
    recording = tracer.record(arm["trace"], **options) if arm.get("trace") else contextlib.nullcontext()
    try:
        with recording:
            return run(path, None, settings, **shared).summary()
    except TraceError as error:
        return {"error": error.line()}


if __name__ == "__main__":
    results = {name: one(sys.argv[1], arm) for name, arm in json.loads(Path(sys.argv[2]).read_text()).items()}
    Path(sys.argv[3]).write_text(json.dumps(results))
