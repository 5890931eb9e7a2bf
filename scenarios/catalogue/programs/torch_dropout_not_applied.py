"""A PyTorch loop that leaves the model in evaluation mode: dropout is configured and never applied."""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `mode` (`eval` or `train`)."""
    from scenarios.paths._torch import build_model

    model = build_model(config, feed)
    model.train(options["mode"] == "train")
    loops.train(config, feed, model, loops.adamw(config, model))
