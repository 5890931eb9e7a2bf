"""Clipping by norm in a sharded run: each rank by the norm of the gradients that it holds, or all by the global one.

The ranks are simulated: the trainable parameters are dealt out to them in order, as a sharding of whole tensors does.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `ranks`, and `local` (true), whether a rank takes its own norm."""
    import torch

    from scenarios.paths._torch import build_model

    model = build_model(config, feed)
    optimizer = loops.adamw(config, model)
    parameters, ranks = loops.trainable(model), options["ranks"]
    size = -(-len(parameters) // ranks)
    shards = [parameters[i : i + size] for i in range(0, len(parameters), size)]

    def clip() -> None:
        for shard in shards if options.get("local", True) else [parameters]:
            torch.nn.utils.clip_grad_norm_(shard, config.clip.value)

    loops.train(config, feed, model, optimizer, before_update=clip)
