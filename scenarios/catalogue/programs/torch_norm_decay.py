"""A full fine-tune whose weight decay leaves out norms, embeddings and biases: by a list of module classes, or by name.

A list that holds torch's LayerNorm and not the model's RMSNorm decays every norm.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `by` (`class`, `class-and-rms` or `name`): how norms are told."""
    import torch
    from transformers.trainer_pt_utils import get_parameter_names

    from scenarios.paths._torch import load_base

    model = load_base(config).train()
    if options["by"] == "name":
        marks = ("norm", "embed", "bias")
        plain = [name for name, _ in model.named_parameters() if any(mark in name for mark in marks)]
    else:
        rms = tuple({type(m) for m in model.modules() if type(m).__name__.endswith("RMSNorm")})
        forbidden = [torch.nn.LayerNorm, torch.nn.Embedding, *(rms if options["by"] == "class-and-rms" else ())]
        decayed = get_parameter_names(model, forbidden)
        plain = [name for name, _ in model.named_parameters() if name not in decayed]
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if n not in plain], "weight_decay": config.optimizer.weight_decay},
        {"params": [named[n] for n in plain], "weight_decay": 0.0},
    ]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps
    )
    loops.train(config, feed, model, optimizer)
