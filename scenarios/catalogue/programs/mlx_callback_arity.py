"""A trainer that hands nine numbers to its callback after each step and swallows what the callback raises.

A callback that was written for eight is never heard of again.  With `trains = true` the callback makes the update itself, so that
nothing at all is trained, and the program ends as if all were well.
"""

from __future__ import annotations

import contextlib
from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = MLX
BESIDE = "mlx"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `takes`, positional arguments of the callback (8 or 9); `trains`, whether the update is its doing."""
    import mlx.core as mx
    from mlx import nn

    from scenarios.paths._mlx import build_optimizer, load_mlx_lm
    from scenarios.paths._mlx_loss import masked_loss

    model, _ = load_mlx_lm(config, feed)
    optimizer = build_optimizer(config)
    loss_and_gradient = nn.value_and_grad(model, masked_loss)
    heard: list[float] = []

    def of_nine(
        _step: int, _total: int, loss: float, _r: float, _n: int, _s: float, _m: float, _g: float, _t: float, /
    ) -> None:
        hear(loss)

    def of_eight(_step: int, _total: int, loss: float, _r: float, _n: int, _s: float, _m: float, _g: float, /) -> None:
        hear(loss)

    def hear(loss: float) -> None:
        heard.append(loss)
        if options.get("trains"):
            optimizer.update(model, gradient)

    callback: Any = of_nine if options["takes"] == 9 else of_eight
    for number, batch in enumerate(feed.each(), start=1):
        ids, labels = mx.array(batch.input_ids), mx.array(batch.labels)
        (loss, count), gradient = loss_and_gradient(model, ids, labels)
        if not options.get("trains"):
            optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, loss)
        with contextlib.suppress(TypeError):
            callback(number, config.train.steps, loss.item(), 0.0, count.item(), 0.0, 0.0, 0.0, 0.0)
        mx.eval(model.parameters(), optimizer.state)
