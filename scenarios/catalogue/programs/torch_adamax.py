"""A PyTorch loop with `torch.optim.Adamax`."""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **_: Any) -> None:
    """No options."""
    import torch

    from scenarios.paths._torch import build_model

    model = build_model(config, feed)
    settings = config.optimizer
    optimizer = torch.optim.Adamax(loops.trainable(model), lr=settings.lr, betas=settings.betas, eps=settings.eps)
    loops.train(config, feed, model, optimizer)
