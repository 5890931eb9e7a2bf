"""mlx-lm's `train` on a data set that masks prompts: each row comes with the offset at which its answer begins.

Rows are truncated to `max_seq_length` by `iterate_batches`, the offset is not; a prompt longer than that leaves no target.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = MLX
BESIDE = "mlx-lm"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `prompt`, tokens of each row that are not supervised; `eager`, without MLX's compiler."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset

    from scenarios.paths._mlx import build_optimizer, load_mlx_lm

    class Rows:
        def __len__(self) -> int:
            return len(feed.rows)

        def __getitem__(self, index: int) -> tuple[int, ...]:
            return feed.rows[index]

        def process(self, row: tuple[int, ...]) -> tuple[list[int], int]:
            return list(row), options["prompt"]

    model, _ = load_mlx_lm(config, feed)
    np.random.seed(config.train.seed)
    optimizer = build_optimizer(config)
    if options.get("eager"):
        mx.disable_compile()
    try:
        with tempfile.TemporaryDirectory(prefix="mlx-lm-") as folder:
            arguments = trainer.TrainingArgs(
                batch_size=config.train.batch,
                iters=config.train.steps,
                steps_per_save=config.train.steps + 1,
                max_seq_length=config.data.row_length,
                adapter_file=str(Path(folder, "adapters.safetensors")),
            )
            trainer.train(model, optimizer, CacheDataset(Rows()), args=arguments)
    finally:
        mx.enable_compile()
