"""PEFT's `modules_to_save` on one of a tied pair: embedding and head are trained as two copies, or stay one."""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `tied`: whether PEFT is told to keep the pair tied."""
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from scenarios.paths._torch import load_base

    base = load_base(config)
    set_seed(config.train.seed)
    settings = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["embed_tokens"] if options["tied"] else ["embed_tokens", "lm_head"],
        ensure_weight_tying=options["tied"],
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, settings).train()
    if options.get("foreach"):
        import torch

        optimizer = torch.optim.AdamW(loops.trainable(model), lr=config.optimizer.lr, weight_decay=0.0, foreach=False)
    else:
        optimizer = loops.adamw(config, model)
    loops.train(config, feed, model, optimizer)
