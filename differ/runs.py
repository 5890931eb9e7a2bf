"""What a trace says of its run, as far as a comparison needs it: a short label, the model's dtype."""

from __future__ import annotations

from typing import Any

from tracer.dtypes import EPSILON, coarser
from tracer.reader import Trace
from tracer.schema import Phase

_SHORT = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}
# Arguments of trainers that make a float32 model compute in another dtype.
_AUTOCAST = {"trainer.args.bf16": "bfloat16", "trainer.args.fp16": "float16"}


def label(trace: Trace) -> str:
    """Path of the run, else its framework, else the file's name."""
    for settings, key in ((trace.declared, "path"), (trace.observed, "path"), (trace.observed, "framework")):
        if settings.get(key):
            return str(settings[key])
    return trace.path.stem


def model_dtype(trace: Trace) -> str:
    """Coarsest float dtype that the run computes in: observed, else that of its weights; float32 if nothing says."""
    named = _dtypes(trace.observed.get("model.dtype"))
    named += _dtypes(trace.observed.get("autocast"))
    named += [dtype for key, dtype in _AUTOCAST.items() if trace.observed.get(key) is True]
    if not named:
        row = trace.row(Phase.INIT, 0)
        named = [entry.dtype for entry in row.layout.entries if entry.shape] if row is not None else []
    coarsest = "float64"
    for dtype in named:
        if dtype in EPSILON:
            coarsest = coarser(coarsest, dtype)
    return coarsest if named else "float32"


def _dtypes(value: Any) -> list[str]:
    words = value if isinstance(value, list) else str(value or "").replace(",", " ").split()
    names = [str(word).rpartition(".")[2] for word in words]
    return [_SHORT.get(name, name) for name in names]
