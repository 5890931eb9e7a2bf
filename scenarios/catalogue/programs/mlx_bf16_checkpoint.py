"""The MLX loop on a checkpoint that is stored in bfloat16, made of the tiny model; `model.dtype` says what it is cast to."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed
from scenarios.models import model_source

NEEDS = MLX
BESIDE = "mlx"


def run(config: RunConfig, feed: Feed, **_: Any) -> None:
    """No options."""
    from scenarios.paths import mlx_loop

    with tempfile.TemporaryDirectory(prefix="checkpoint-") as folder:
        _save_as_bf16(Path(model_source(config.model.name)), Path(folder))
        mlx_loop.run(replace(config, model=replace(config.model, name=folder)), feed)


def _save_as_bf16(source: Path, folder: Path) -> None:
    import mlx.core as mx

    for file in source.glob("*.json"):
        shutil.copy(file, folder)
    weights: Any = mx.load(str(source / "model.safetensors"))
    half = {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half, metadata={"format": "pt"})
