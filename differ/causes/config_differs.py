"""`config.differs`: a setting differs, as declared by the program or as found in its live objects.

Settings are never judged, so this explains no share of a difference; those that can have to do with the first findings
come first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from differ.causes.context import Context
from differ.result import Cause

ID: Final = "config.differs"

# Beginning of a setting's key -> phases in which a difference of it would show first.  The first match counts.
RELATED: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("lora", ("init", "grad")),
    ("seed", ("init", "batch")),
    ("init", ("init",)),
    ("model", ("init", "forward", "loss", "grad")),
    ("optimizer.lr", ("hparams",)),
    ("optimizer.schedule", ("hparams",)),
    ("optimizer.warmup", ("hparams",)),
    ("schedule", ("hparams",)),
    ("optimizer", ("hparams", "opt_state", "param")),
    ("clip", ("clipped_grad",)),
    ("accumulation", ("batch", "loss", "grad")),
    ("batch", ("batch",)),
    ("data", ("batch",)),
    ("train.accum", ("batch", "loss", "grad")),
    ("train", ("batch", "hparams")),
    ("loss", ("loss",)),
    ("compile", ("forward", "loss", "grad")),
    ("trainer.args.max_grad_norm", ("clipped_grad",)),
    ("trainer.args.learning_rate", ("hparams",)),
    ("trainer.args.seed", ("init", "batch")),
)
# A list or an object in a setting is shown only if it is short.
LONGEST: Final = 60


def find(context: Context) -> list[Cause]:
    """All settings that both sides name and that differ, those related to the earliest findings first."""
    a, b = _settings(context.a.declared, context.a.observed), _settings(context.b.declared, context.b.observed)
    phases = list(dict.fromkeys(finding.phase for finding in context.findings))
    keys = sorted((key for key in a if key in b and a[key] != b[key]), key=lambda key: (_rank(key, phases), key))
    return [_cause(key, a[key], b[key]) for key in keys if _showable(a[key]) and _showable(b[key])]


def _settings(declared: Mapping[str, Any], observed: Mapping[str, Any]) -> dict[str, Any]:
    """Both documents in one; what was declared keeps its key, what was observed may repeat it."""
    return {**observed, **declared}


def _rank(key: str, phases: list[str]) -> int:
    """Position of the earliest finding whose phase this setting bears on."""
    related = next((found for prefix, found in RELATED if key.startswith(prefix)), ())
    return min((phases.index(phase) for phase in related if phase in phases), default=len(phases))


def _showable(value: Any) -> bool:
    return len(str(value)) <= LONGEST


def _cause(key: str, a: Any, b: Any) -> Cause:
    summary = f"{key}: a {_word(a)}, b {_word(b)}"
    return Cause(ID, summary, step=0, phase="config", names=(key,), parameters={"a": a, "b": b})


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
