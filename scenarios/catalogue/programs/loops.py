"""The loop that the PyTorch programs have in common, with the places where one of them does something else.

Plain and eager; a step's gradient is the mean over its micro-batches, as on the path `torch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scenarios.config import RunConfig
from scenarios.data import MicroBatch
from scenarios.feed import Feed


def tensors(batch: MicroBatch) -> dict[str, Any]:
    """Arguments of a transformers model."""
    import torch

    arrays = {"input_ids": batch.input_ids, "labels": batch.labels, "attention_mask": batch.attention_mask}
    return {name: torch.from_numpy(array) for name, array in arrays.items() if array is not None}


def trainable(model: Any) -> list[Any]:
    """Parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def plain_loss(model: Any, batch: MicroBatch) -> Any:
    """The mean over the supervised positions, as transformers computes it."""
    return model(**tensors(batch)).loss


def train(
    config: RunConfig,
    feed: Feed,
    model: Any,
    optimizer: Any,
    *,
    loss: Callable[[Any, MicroBatch], Any] = plain_loss,
    after_micro_batch: Callable[[], None] = lambda: None,
    before_update: Callable[[], None] = lambda: None,
    after_update: Callable[[], None] = lambda: None,
) -> None:
    """Train on the batches of `feed`; a micro-batch's loss is divided by their number before it is differentiated.

    `after_micro_batch` comes last, after the update where there is one.
    """
    count = config.train.accumulation
    for number, batch in enumerate(feed.each(), start=1):
        (loss(model, batch) / count).backward()
        if number % count == 0:
            before_update()
            optimizer.step()
            after_update()
            optimizer.zero_grad()
        after_micro_batch()


def adamw(config: RunConfig, model: Any) -> Any:
    """The optimizer as configured, over all trainable parameters."""
    from scenarios.paths._torch import optimizer_of

    kind, options = optimizer_of(config.optimizer)
    return kind(trainable(model), **options)
