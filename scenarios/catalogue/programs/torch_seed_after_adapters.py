"""A script that sets its seed when it starts to train: the adapters have been drawn by then."""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `late` (true): whether the seed is set after the adapters are built."""
    import torch
    from peft import get_peft_model
    from transformers import set_seed

    from scenarios.paths._torch import adapter_settings, load_base

    base = load_base(config)
    torch.manual_seed(20_201)  # where the generator of a script that has not been seeded may stand
    if not options.get("late", True):
        set_seed(config.train.seed)
    model = get_peft_model(base, adapter_settings(base, config)).train()
    set_seed(config.train.seed)
    loops.train(config, feed, model, loops.adamw(config, model))
