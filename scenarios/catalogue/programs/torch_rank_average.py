"""Data-parallel ranks that average their losses over their own tokens, and then the gradients over the ranks.

Each rank takes a micro-batch of the step, under DistributedDataParallel.  The right way divides by the tokens of all ranks.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.data import MicroBatch
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `own_tokens` (true): whether a rank divides by its own number of tokens."""
    from torch.nn.parallel import DistributedDataParallel

    from scenarios.paths._torch import build_model

    ranks = loops.join_ranks()
    mine, totals = loops.of_this_rank(config, feed)
    model = DistributedDataParallel(build_model(config, feed))

    def loss(model: Any, batch: MicroBatch) -> Any:
        import torch

        if options.get("own_tokens", True):
            return loops.plain_loss(model, batch)
        total = torch.tensor(totals[id(batch)])
        return model(**loops.tensors(batch), num_items_in_batch=total).loss * ranks

    loops.train(*mine, model, loops.adamw(config, model), loss=loss)
