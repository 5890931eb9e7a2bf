"""Path `mlx-lm`: `mlx_lm.tuner.trainer.train` with `linear_to_lora_layers`.

Notable: train() always compiles (`train.compile = false` turns MLX's compiler off for the run), never clips (see
`_mlx`), and averages micro-batches unweighted.  With `data.batching = "library"` its own `iterate_batches` is used;
given batches come through an iterator of the same signature.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scenarios.config import RunConfig
from scenarios.data import Rows
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from scenarios.paths._mlx import build_optimizer, outcome_of
from scenarios.paths._mlx_loss import Loss
from scenarios.paths._mlx_parts import run_parts
from tracer.errors import BadConfig


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train with mlx-lm's trainer."""
    return run_parts(config, feed, "mlx-lm")


def train(config: RunConfig, feed: Feed, model: Any, loss: Loss) -> Outcome:
    """The run of mlx-lm's train()."""
    import mlx.core as mx
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback

    class KeepLosses(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            losses.append(train_info["train_loss"])

    if config.loss.reduction == "token-mean" and config.train.accumulation > 1:
        raise BadConfig("loss.reduction: mlx-lm averages micro-batches unweighted", "use the path mlx")
    losses: list[Any] = []
    optimizer = build_optimizer(config)
    if isinstance(config.train.data_seed, int):
        np.random.seed(config.train.data_seed)
    if config.train.compile is False:
        mx.disable_compile()
    try:
        with tempfile.TemporaryDirectory(prefix="mlx-lm-") as folder:
            trainer.train(
                model=model,
                optimizer=optimizer,
                train_dataset=_data_set(feed.rows),
                val_dataset=_validation(config, feed),
                args=_arguments(config, folder),
                training_callback=KeepLosses(),
                loss=loss.function,
                **_given_batches(feed, loss),
            )
    finally:
        if config.train.compile is False:
            mx.enable_compile()
    return outcome_of(model, optimizer, losses)


def _arguments(config: RunConfig, folder: str) -> Any:
    from mlx_lm.tuner.trainer import TrainingArgs

    train = config.train
    iterations = train.steps * train.accumulation
    return TrainingArgs(
        batch_size=train.batch,
        iters=iterations,
        val_batches=train.validation_batches,
        steps_per_report=1,
        steps_per_eval=max(1, train.validate_every * train.accumulation),
        steps_per_save=iterations + 1,  # the file of the end is all that is written
        adapter_file=str(Path(folder) / "adapters.safetensors"),
        grad_checkpoint=train.checkpointing is True,
        grad_accumulation_steps=train.accumulation,
    )


def _validation(config: RunConfig, feed: Feed) -> Any:
    if not config.train.validate_every:
        return None
    if feed.steps is not None:
        raise BadConfig("train.validate_every: mlx-lm validates on its own batches", 'use data.batching = "library"')
    return _data_set(feed.rows)


def _data_set(rows: Rows) -> Any:
    """Token rows as mlx-lm's CacheDataset.

    Items are dicts, as those of mlx-lm's own data sets: CacheDataset takes the length of the item for that of the row.
    """
    from mlx_lm.tuner.datasets import CacheDataset

    class TokenRows:
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, tuple[int, ...]]:
            return {"tokens": rows[index]}

        def process(self, item: dict[str, tuple[int, ...]]) -> tuple[list[int], int]:
            return list(item["tokens"]), 0

    return CacheDataset(TokenRows())


def _given_batches(feed: Feed, loss: Loss) -> dict[str, Any]:
    """The argument of train() that feeds it the given micro-batches; none where mlx-lm makes its own."""
    import mlx.core as mx

    if feed.steps is None:
        return {}

    def iterate_batches(**_: Any) -> Iterator[tuple[Any, ...]]:
        for micro_batch in feed.each():
            yield tuple(mx.array(array) for array in loss.arrays(micro_batch))

    return {"iterate_batches": iterate_batches}
