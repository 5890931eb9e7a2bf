"""Gradient checkpointing, reentrant, over a frozen embedding: no input of a checkpointed block needs a gradient.

Adapters in every layer and the final norm are trained; with reentrant checkpointing only the norm learns, unless
`enable_input_require_grads` makes the embedding's output need a gradient.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `checkpointing` (none, reentrant or not-reentrant), `inputs`, whether inputs are made to need gradients."""
    from scenarios.paths._torch import build_model

    model = build_model(config, feed)
    for name, parameter in model.named_parameters():
        if name.endswith("model.norm.weight"):
            parameter.requires_grad_(True)
    if options["checkpointing"] != "none":
        reentrant = options["checkpointing"] == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.config.use_cache = False
        if not options.get("inputs", False):
            model.disable_input_require_grads()
    loops.train(config, feed, model, loops.adamw(config, model))
