"""mlx-lm's `train` for a number of iterations that is no multiple of the accumulation: the last window makes no update."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = MLX
BESIDE = "mlx-lm"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `iterations`: how many micro-batches are trained on."""
    import mlx.core as mx
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset

    from scenarios.paths import _mlx, _mlx_loss

    model, _ = _mlx.load_mlx_lm(config, feed)
    loss = _mlx_loss.mlx_lm(config, feed)

    def batches(**_: Any) -> Iterator[tuple[Any, ...]]:
        for batch in feed.each():
            yield tuple(mx.array(array) for array in loss.arrays(batch))

    with tempfile.TemporaryDirectory(prefix="mlx-lm-") as folder:
        arguments = trainer.TrainingArgs(
            batch_size=config.train.batch,
            iters=options["iterations"],
            steps_per_save=options["iterations"] + 1,
            grad_accumulation_steps=config.train.accumulation,
            adapter_file=str(Path(folder, "adapters.safetensors")),
        )
        rows = CacheDataset([])
        trainer.train(model, _mlx.build_optimizer(config), rows, args=arguments, iterate_batches=batches)
