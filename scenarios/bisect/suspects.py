"""Which changes are likely behind a divergence, from its first cause: they are tried first.

A guess saves runs and decides nothing: ddmin tests whatever it is told first like everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from scenarios.bisect.runs import Answer

# Beginning of a cause's id, or a phase for a divergence without one -> beginnings of keys, the likeliest first.
LIKELY: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("init.names", ("lora.layers", "lora.targets", "lora.rank")),
    ("init.draw", ("init", "train.seed", "lora.rank")),
    ("init.scale", ("init", "parts.loader", "lora.rank")),
    ("init.swapped", ("init", "parts.loader", "lora.targets")),
    ("init.frozen", ("model.dtype", "model.name", "parts.loader")),
    ("lora.scale", ("lora.scale", "lora.alpha", "lora.rank")),
    ("schedule.lr", ("optimizer.lr", "optimizer.schedule", "optimizer.warmup", "train.steps")),
    ("batch.", ("batches", "data.", "train.batch", "train.data_seed", "train.accumulation")),
    ("forward.", ("parts.loader", "model.")),
    ("loss.", ("parts.loss", "loss.", "model.dtype", "train.accumulation", "train.autocast")),
    ("grad.", ("train.accumulation", "loss.", "parts.loop", "parts.loss")),
    ("clip.", ("clip.", "parts.loop")),
    ("optimizer.bias_correction", ("optimizer.bias_correction", "optimizer.name", "parts.loop")),
    ("optimizer.weight_decay", ("optimizer.weight_decay", "optimizer.name", "parts.loop")),
    ("optimizer.", ("optimizer.", "parts.loop")),
    ("precision.", ("model.dtype", "train.autocast")),
    ("rng.dropout", ("lora.dropout", "train.seed")),
    ("init", ("lora.", "init", "train.seed", "model.", "parts.loader")),
    ("hparams", ("optimizer.",)),
    ("batch", ("batches", "data.", "train.")),
    ("forward", ("model.", "parts.loader")),
    ("loss", ("parts.loss", "loss.", "model.")),
    ("grad", ("train.", "loss.", "parts.loss")),
    ("clipped_grad", ("clip.", "parts.loop")),
    ("opt_state", ("optimizer.",)),
    ("param", ("optimizer.", "parts.loop")),
)
_SCALE: Final = ".lora_scale"


def suspects(answer: Answer, keys: Sequence[str]) -> tuple[str, ...]:
    """The likely ones among `keys`, the likeliest first; empty where nothing tells, or where all are."""
    words = [str(cause["id"]) for cause in answer.causes[:1]]
    if answer.first is not None:
        name = str(answer.first.get("name") or "")
        words += ["lora.scale"] if name.endswith(_SCALE) else []
        words.append(str(answer.first["phase"]))
    for word in words:
        beginnings = next((likely for start, likely in LIKELY if word.startswith(start)), ())
        found = [key for beginning in beginnings for key in keys if key.startswith(beginning)]
        if found:
            return tuple(dict.fromkeys(found)) if len(set(found)) < len(keys) else ()
    return ()
