"""Path `mlx`: a hand-written MLX loop over mlx-lm's model and LoRA layers, the step compiled or eager.

Notable: as in mlx-lm's train(), the gradient of a step is the mean of its micro-batches' means, unless
`loss.reduction = "token-mean"` weights each by its tokens.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from scenarios.config import RunConfig
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from scenarios.paths._mlx import build_optimizer, outcome_of
from scenarios.paths._mlx_loss import Loss
from scenarios.paths._mlx_parts import run_parts
from tracer.errors import BadConfig


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train on the batches of `feed`."""
    return run_parts(config, feed, "mlx")


def train(config: RunConfig, feed: Feed, model: Any, loss: Loss) -> Outcome:
    """The loop; compiled unless `train.compile` is false."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.tuner.trainer import grad_checkpoint

    if config.train.validate_every:
        raise BadConfig("train.validate_every: this loop does not validate", "use mlx-lm, hf-trainer or trl-sft")
    if config.train.checkpointing is True:
        grad_checkpoint(model.layers[0])
    optimizer = build_optimizer(config)
    loss_and_gradient = nn.value_and_grad(model, loss.function)
    micro_batches, by_tokens = config.train.accumulation, config.loss.reduction == "token-mean"
    state = [model.state, optimizer.state, mx.random.state]

    def step(arrays: tuple[Any, ...], before: Any, last: bool) -> tuple[Any, Any]:
        (value, count), gradient = loss_and_gradient(model, *arrays)
        if micro_batches > 1:
            gradient = _accumulated(before, gradient, count if by_tokens else mx.array(1))
        if not last:
            return value, gradient
        if micro_batches > 1:
            gradient = _mean(gradient)
        optimizer.update(model, gradient)
        return value, None

    if config.train.compile is not False:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    losses = []
    gradient: Any = None
    for number, micro_batch in enumerate(feed.each(), start=1):
        arrays = tuple(mx.array(array) for array in loss.arrays(micro_batch))
        value, gradient = step(arrays, gradient, number % micro_batches == 0)
        mx.eval(state, value, gradient)
        losses.append(value.item())
    return outcome_of(model, optimizer, losses)


def _accumulated(before: Any, gradient: Any, weight: Any) -> tuple[Any, Any]:
    """(sum of weight times gradient, sum of the weights)."""
    import mlx.core as mx
    from mlx.utils import tree_map

    weighted = tree_map(lambda g: g * weight.astype(g.dtype), gradient)
    if before is None:
        return weighted, weight + 0  # an output of its own: a token count may be none that a compiled step can return
    return tree_map(mx.add, before[0], weighted), before[1] + weight


def _mean(accumulated: tuple[Any, Any]) -> Any:
    from mlx.utils import tree_map

    gradients, weights = accumulated
    return tree_map(lambda g: g / weights.astype(g.dtype), gradients)
