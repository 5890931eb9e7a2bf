"""Hand the rows of a synthetic run to the recorder of this process, as a backend would: a training run without a framework."""

from __future__ import annotations

from typing import Any

from tests.builders import FAULTS, Run, Trainer, _apply
from tracer.recorder import current


def drive(fault: str | None = None, *, stop: str = "", **settings: Any) -> None:
    """Train synthetically; `fault` is a key of FAULTS, `stop` a reason for which recording stops after step 1."""
    run = Run(**settings)
    if fault is not None:
        run = FAULTS[fault](run)
    recorder = current()
    assert recorder is not None, "nothing records"
    recorder.declare({"path": "synthetic", "optimizer.lr": run.lr, **run.declared})
    recorder.observe("framework", "numpy")
    recorder.observe("model.dtype", run.base_dtype)
    for step, rows in enumerate(Trainer(run).rows()):
        for row in rows:
            changed = _apply(run, row)
            if changed is not None:
                recorder.add(changed.phase, changed.records, changed.micro_batch)
        recorder.end_step()
        if stop and step == 1:
            recorder.stop(stop)
