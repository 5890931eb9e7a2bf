"""Data-parallel ranks that average their losses over their own tokens, and then the gradients over the ranks.

The ranks are simulated: each takes a micro-batch of the step.  The right way divides by the tokens of all ranks.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.data import MicroBatch
from scenarios.feed import Feed

NEEDS = TORCH


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `own_tokens` (true): whether a rank divides by its own number of tokens."""
    from scenarios.paths._torch import build_model

    assert feed.steps is not None
    model = build_model(config, feed)
    optimizer = loops.adamw(config, model)
    totals = {id(batch): sum(int(b.supervised.sum()) for b in step) for step in feed.steps for batch in step}
    ranks = config.train.accumulation

    def loss(model: Any, batch: MicroBatch) -> Any:
        import torch

        if options.get("own_tokens", True):
            return loops.plain_loss(model, batch)
        total = torch.tensor(totals[id(batch)])
        return model(**loops.tensors(batch), num_items_in_batch=total).loss * ranks

    loops.train(config, feed, model, optimizer, loss=loss)
