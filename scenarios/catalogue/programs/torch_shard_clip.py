"""Clipping by norm in a sharded run (FSDP2): each rank by the norm of the shards that it holds, or all by the global one."""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `local` (true): whether a rank takes its own norm."""
    import torch
    from torch.distributed.fsdp import fully_shard

    from scenarios.paths._torch import build_model

    loops.join_ranks()
    mine, _ = loops.of_this_rank(config, feed)
    model = build_model(config, feed)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    parameters = loops.trainable(model)

    def clip() -> None:
        if not options.get("local", True):
            torch.nn.utils.clip_grad_norm_(parameters, config.clip.value)
            return
        held = [parameter.grad.to_local() for parameter in parameters]
        norm = torch.stack([part.norm() for part in held]).norm()
        for part in held:
            part.mul_((config.clip.value / (norm + 1e-6)).clamp(max=1.0))

    loops.train(*mine, model, loops.adamw(config, model), before_update=clip)
