"""Path `mlx`: a hand-written MLX loop over mlx-lm's model and LoRA layers, the step compiled or eager.

Notable: as in mlx-lm's train(), the gradient of a step is the mean of its micro-batches' means.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from scenarios.config import RunConfig
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from scenarios.paths._mlx import build_model, build_optimizer, masked_loss, outcome_of


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train on the batches of `feed`; compiled unless `train.compile` is false."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map

    model = build_model(config, feed)
    optimizer = build_optimizer(config)
    loss_and_gradient = nn.value_and_grad(model, masked_loss)
    micro_batches = config.train.accumulation
    state = [model.state, optimizer.state, mx.random.state]

    def step(input_ids: Any, labels: Any, before: Any, last: bool) -> tuple[Any, Any]:
        (loss, _), gradient = loss_and_gradient(model, input_ids, labels)
        if before is not None:
            gradient = tree_map(mx.add, before, gradient)
        if not last:
            return loss, gradient
        if micro_batches > 1:
            gradient = tree_map(lambda g: g / micro_batches, gradient)
        optimizer.update(model, gradient)
        return loss, None

    if config.train.compile is not False:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    losses = []
    gradient: Any = None
    for number, micro_batch in enumerate(feed.each(), start=1):
        ids, labels = mx.array(micro_batch.input_ids), mx.array(micro_batch.labels)
        loss, gradient = step(ids, labels, gradient, number % micro_batches == 0)
        mx.eval(state, loss, gradient)
        losses.append(loss.item())
    return outcome_of(model, optimizer, losses)
