"""A PyTorch loop with AdamW as transformers had it: eps is added to the root before the bias is corrected.

torch adds it after.  With `late` eps is divided by the same root, which gives torch's.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.catalogue.programs.adamw import written_adamw
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `late`: eps after the correction."""
    from scenarios.paths._torch import build_model

    model = build_model(config, feed)
    optimizer = written_adamw(config.optimizer, loops.trainable(model), eps_late=options.get("late", False))
    loops.train(config, feed, model, optimizer)
