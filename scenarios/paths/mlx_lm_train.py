"""Path `mlx-lm`: `mlx_lm.tuner.trainer.train` with `linear_to_lora_layers`.

Notable: train() always compiles (`train.compile = false` turns MLX's compiler off for the run), never clips (see
`_mlx`), and averages micro-batches unweighted.  With `data.batching = "library"` its own `iterate_batches` is used.
Given batches come through an iterator of the same signature; where each row's supervised positions are one stretch
and the labels are the tokens, mlx-lm's `default_loss` is told that stretch, otherwise `_mlx.masked_loss` is used.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from scenarios.config import RunConfig
from scenarios.data import MicroBatch
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from scenarios.paths._mlx import build_model, build_optimizer, masked_loss, outcome_of


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train with mlx-lm's trainer."""
    import mlx.core as mx
    from mlx_lm.tuner import trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.datasets import CacheDataset

    class KeepLosses(TrainingCallback):  # type: ignore[misc]
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            losses.append(train_info["train_loss"])

    losses: list[Any] = []
    model = build_model(config, feed)
    optimizer = build_optimizer(config)
    if config.train.compile is False:
        mx.disable_compile()
    try:
        with tempfile.TemporaryDirectory(prefix="mlx-lm-") as folder:
            trainer.train(
                model=model,
                optimizer=optimizer,
                train_dataset=CacheDataset(_Rows(feed)),
                args=_arguments(config, folder),
                training_callback=KeepLosses(),
                **_given_batches(feed),
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
        steps_per_report=1,
        steps_per_save=iterations + 1,  # the file of the end is all that is written
        adapter_file=str(Path(folder) / "adapters.safetensors"),
        grad_accumulation_steps=train.accumulation,
    )


class _Rows:
    """Token rows as a data set for mlx-lm's CacheDataset: `process` gives (tokens, offset)."""

    def __init__(self, feed: Feed) -> None:
        self.rows = feed.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return self.rows[index]

    def process(self, row: tuple[int, ...]) -> tuple[list[int], int]:
        return list(row), 0


def _given_batches(feed: Feed) -> dict[str, Any]:
    """Arguments of train() that feed it the given micro-batches; none where mlx-lm makes its own."""
    import mlx.core as mx

    if feed.steps is None:
        return {}
    stretches = [supervised_stretch(micro_batch) for micro_batch in feed.each()]
    second = [stretch for stretch in stretches if stretch is not None]
    plain = len(second) == len(stretches)
    if not plain:
        print("mlx-lm: a row's supervised positions are not one stretch, using a masked loss", file=sys.stderr)
        second = [micro_batch.labels for micro_batch in feed.each()]

    def iterate_batches(**_: Any) -> Iterator[tuple[Any, Any]]:
        for micro_batch, given in zip(feed.each(), second, strict=True):
            yield mx.array(micro_batch.input_ids), mx.array(given)

    return {"iterate_batches": iterate_batches} | ({} if plain else {"loss": masked_loss})


def supervised_stretch(micro_batch: MicroBatch) -> npt.NDArray[np.int64] | None:
    """[B, 2] first and last supervised position of each row, as mlx-lm's loss counts them (both inclusive).

    None where that cannot say it: a row with a hole, or labels that are not the tokens.  A row without any is (1, 0).
    """
    supervised = micro_batch.supervised
    result = np.zeros((len(supervised), 2), np.int64)
    for row, flags in enumerate(supervised):
        at = np.flatnonzero(flags)
        result[row] = (at[0], at[-1]) if at.size else (1, 0)
        if at.size and at[-1] - at[0] + 1 != at.size:
            return None
    equal = np.array_equal(micro_batch.labels[supervised], micro_batch.input_ids[supervised])
    return result if equal else None
