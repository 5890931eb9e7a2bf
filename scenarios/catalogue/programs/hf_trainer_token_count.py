"""transformers' Trainer over a model whose loss takes the step's token count and ignores it.

Trainer then neither divides by the number of micro-batches nor does the loss divide by the step's tokens: each
micro-batch's mean is added up, and gradients are as many times too large as there are micro-batches.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = (*TORCH, "accelerate")
BESIDE = "hf-trainer"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `ignored` (true): whether the loss ignores the count it is given."""
    from scenarios.paths import hf_trainer

    if not options.get("ignored", True):
        hf_trainer.run(config, feed)
        return
    from transformers import Trainer

    original = Trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return original(self, model, inputs, return_outputs, None)

    Trainer.compute_loss = compute_loss
    try:
        hf_trainer.run(config, feed)
    finally:
        Trainer.compute_loss = original
