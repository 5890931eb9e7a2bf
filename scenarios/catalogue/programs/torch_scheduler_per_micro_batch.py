"""A PyTorch loop with gradient accumulation whose scheduler is advanced after every micro-batch, not after every update."""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `per_micro_batch` (true): where the scheduler is advanced."""
    import torch

    from scenarios.paths._torch import build_model
    from scenarios.schedule import schedule_of

    model = build_model(config, feed)
    optimizer = loops.adamw(config, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_of(config).factor)
    where = "after_micro_batch" if options.get("per_micro_batch", True) else "after_update"
    loops.train(config, feed, model, optimizer, **{where: schedule.step})
