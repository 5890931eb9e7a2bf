"""A mask of multi-turn answers whose first token is left out: each answer is supervised from its second token on.

Turns alternate, prompt and answer, each of `turn` tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.data import IGNORED, MicroBatch
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `turn`, tokens of a turn; `late`, how many tokens of an answer come before the first that is supervised."""
    from scenarios.paths._torch import build_model

    assert feed.steps is not None
    steps = tuple(tuple(_answers(batch, options["turn"], options.get("late", 1)) for batch in s) for s in feed.steps)
    model = build_model(config, feed)
    loops.train(config, replace(feed, steps=steps), model, loops.adamw(config, model))


def _answers(batch: MicroBatch, turn: int, late: int) -> MicroBatch:
    """The micro-batch with the answers alone supervised."""
    at = np.arange(batch.labels.shape[1])
    answer = (at // turn % 2 == 1) & (at % turn >= late)
    return replace(batch, labels=np.where(answer, batch.labels, IGNORED))
