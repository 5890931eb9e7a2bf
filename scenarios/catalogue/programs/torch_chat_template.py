"""Conversations rendered by a chat template that writes BOS, then tokenized by a tokenizer that adds BOS once more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.corpus import sentences
from scenarios.data import plain_batches
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"
_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `special` (true): whether the rendered text is tokenized with special tokens added."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    from scenarios.models import model_source
    from scenarios.paths._torch import build_model

    tokenizer = AutoTokenizer.from_pretrained(model_source(config.model.name))
    tokenizer.chat_template = _TEMPLATE
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    rows = []
    for text in sentences(config.data.rows, config.data.seed):
        message = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(message, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=options.get("special", True))["input_ids"]
        rows.append(tuple(ids[: config.data.row_length]))
    steps = plain_batches(tuple(rows), config.data, config.train, feed.pad)
    model = build_model(config, feed)
    loops.train(config, replace(feed, steps=steps), model, loops.adamw(config, model))
