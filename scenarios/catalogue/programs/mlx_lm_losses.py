"""mlx-lm's `train` with a loss that masks by a bool or by a float32 array, and guards its denominator or not.

`ce * mask` keeps the dtype of the cross-entropy where the mask is bool and becomes float32 where the mask is: with a
bfloat16 model one of the two sums in bfloat16.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = MLX
BESIDE = "mlx-lm"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `mask` (`bool` or `float32`) and `guard`, whether the denominator is at least 1."""
    import mlx.core as mx
    from mlx import nn

    from scenarios.paths import _mlx, _mlx_loss, mlx_lm_train

    def loss(model: Any, batch: Any, lengths: Any) -> tuple[Any, Any]:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        steps = mx.arange(1, targets.shape[1] + 1)
        mask = mx.logical_and(steps >= lengths[:, 0:1], steps <= lengths[:, 1:])
        count = mask.sum()
        if options["mask"] == "float32":
            mask = mask.astype(mx.float32)
        each = nn.losses.cross_entropy(model(inputs), targets) * mask
        return each.sum() / (mx.maximum(count, 1) if options["guard"] else count), count

    model, _ = _mlx.load_mlx_lm(config, feed)
    arrays = _mlx_loss.mlx_lm(config, feed).arrays
    mlx_lm_train.train(config, feed, model, _mlx_loss.Loss(loss, arrays))
