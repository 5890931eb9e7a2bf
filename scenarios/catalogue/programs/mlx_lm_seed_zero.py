"""mlx-lm's batches with a seed of 0, taken for no seed: `if seed:` where `if seed is not None:` was meant.

What order the batches come in then hangs on what drew from numpy's generator before.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = MLX
BESIDE = "mlx"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `ignored` (true): whether a seed of 0 counts as none."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.datasets import CacheDataset

    from scenarios.data import collate
    from scenarios.paths import _mlx, _mlx_loss, mlx_loop

    model, _ = _mlx.load_mlx_lm(config, feed)
    np.random.random(3)
    seed = (config.train.seed or None) if options.get("ignored", True) else config.train.seed
    rows = CacheDataset(_Rows(feed.rows))
    loader = trainer.iterate_batches(rows, config.train.batch, config.data.row_length, seed=seed)
    count = config.train.steps
    taken = [next(loader) for _ in range(count)]
    steps = []
    for ids, lengths in taken:
        whole = [row[: int(end)] for row, (_, end) in zip(np.array(ids).tolist(), np.array(lengths), strict=True)]
        steps.append((collate(whole, feed.pad),))
    mx.eval(model.parameters())
    mlx_loop.train(config, Feed(feed.rows, feed.pad, tuple(steps)), model, _mlx_loss.masked(config))


class _Rows:
    """Token rows as mlx-lm's CacheDataset takes them."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]

    def process(self, row: Any) -> tuple[list[int], int]:
        return list(row), 0
