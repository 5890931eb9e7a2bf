"""Two documents packed into one row, with positions that begin again at the second, or one run of positions over both.

Given positions that begin again, transformers keeps the documents' attention apart; without them the second sees the first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.data import IGNORED, MicroBatch
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `reset`: whether positions begin again at each document."""
    import torch

    from scenarios.paths._torch import build_model

    def loss(model: Any, batch: MicroBatch) -> Any:
        ids, labels, positions = _packed(batch, reset=options["reset"])
        return model(
            input_ids=torch.from_numpy(ids), labels=torch.from_numpy(labels), position_ids=torch.from_numpy(positions)
        ).loss

    model = build_model(config, feed)
    loops.train(config, feed, model, loops.adamw(config, model), loss=loss)


def _packed(batch: MicroBatch, *, reset: bool) -> tuple[Any, Any, Any]:
    """Ids, labels and positions [1, sum of lengths] of the rows one after another; a document's first token is no target."""
    assert batch.attention_mask is not None
    lengths = batch.attention_mask.sum(axis=1)
    ids = np.concatenate([row[:n] for row, n in zip(batch.input_ids, lengths, strict=True)])
    labels = ids.copy()
    labels[np.cumsum(lengths)[:-1]] = IGNORED
    labels[0] = IGNORED
    each = [np.arange(n) for n in lengths]
    positions = np.concatenate(each) if reset else np.arange(len(ids))
    return ids[None], labels[None], positions[None].astype(np.int64)
