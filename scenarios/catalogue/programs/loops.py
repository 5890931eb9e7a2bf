"""The loop that the PyTorch programs have in common, with the places where one of them does something else.

Plain and eager; a step's gradient is the mean over its micro-batches, as on the path `torch`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
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


def join_ranks() -> int:
    """Make torchrun's ranks a process group of the CPU, once a process; how many there are.

    A second group would find the addresses of the first in torchrun's store.
    """
    import atexit

    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(_leave_ranks)
    return int(dist.get_world_size())


def _leave_ranks() -> None:
    import gc

    import torch.distributed as dist

    # A sharded model that outlives the group aborts the process at its end, now and then (torch 2.13, gloo).
    gc.collect()
    dist.destroy_process_group()


def of_this_rank(config: RunConfig, feed: Feed) -> tuple[tuple[RunConfig, Feed], Mapping[int, int]]:
    """Settings and feed with this rank's micro-batch of each step alone; by its id, the supervised tokens of all ranks."""
    import torch.distributed as dist

    assert feed.steps is not None
    rank = dist.get_rank()
    totals = {id(step[rank]): sum(int(b.supervised.sum()) for b in step) for step in feed.steps}
    alone = replace(config, train=replace(config.train, accumulation=1))
    return (alone, replace(feed, steps=tuple((step[rank],) for step in feed.steps))), totals
