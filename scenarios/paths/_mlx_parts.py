"""An MLX run put together of parts: a loader with its LoRA set-up, a loss, and a loop.

Each MLX path is one choice of the three; `parts.loader`, `parts.loss` and `parts.loop` exchange one of them for another
path's, which makes the hybrids that tell whose part a difference comes from.  Settings that no MLX path can honour are
refused here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from scenarios.config import RunConfig
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from scenarios.paths import _mlx_loss
from scenarios.paths._mlx import load_mlx_lm
from scenarios.paths._mlx_loss import Loss
from tracer.errors import BadConfig, PathUnavailable


@dataclass(frozen=True, slots=True)
class Parts:
    """Names of the paths whose loader, loss and loop a run takes."""

    loader: str
    loss: str
    loop: str


OWN: Final = {
    "mlx": Parts("mlx-lm", "mlx", "mlx"),
    "mlx-lm": Parts("mlx-lm", "mlx-lm", "mlx-lm"),
    "unsloth-mlx": Parts("unsloth-mlx", "unsloth-mlx", "unsloth-mlx"),
}


def parts_of(config: RunConfig, path: str) -> Parts:
    """What a run on `path` is made of."""
    own, given = OWN[path], config.parts
    return Parts(
        *(
            g if g != "path" else o
            for g, o in ((given.loader, own.loader), (given.loss, own.loss), (given.loop, own.loop))
        )
    )


def run_parts(config: RunConfig, feed: Feed, path: str) -> Outcome:
    """Load, adapt and train; raises BadConfig for what MLX cannot do, PathUnavailable for a part that is not installed."""
    import mlx.core as mx

    parts = parts_of(config, path)
    _refuse(config)
    _need_unsloth(parts)
    if config.train.device == "cpu":
        mx.set_default_device(mx.cpu)
    model, tokenizer = _load(parts, config, feed)
    loss = _loss(parts, config, feed, model)
    if feed.steps is None and not loss.by_lengths:
        raise BadConfig('parts.loss = "mlx" needs batches that are known beforehand', 'use data.batching = "plain"')
    if parts.loop == "unsloth-mlx":
        from scenarios.paths.unsloth_mlx import train as unsloth_train

        return unsloth_train(config, feed, model, tokenizer, None if parts.loss == parts.loop else loss)
    if parts.loop == "mlx-lm":
        from scenarios.paths.mlx_lm_train import train as mlx_lm_train

        return mlx_lm_train(config, feed, model, loss)
    from scenarios.paths.mlx_loop import train

    return train(config, feed, model, loss)


def _load(parts: Parts, config: RunConfig, feed: Feed) -> tuple[Any, Any]:
    if parts.loader == "mlx-lm":
        return load_mlx_lm(config, feed)
    from scenarios.paths.unsloth_mlx import load

    return load(config, feed)


def _loss(parts: Parts, config: RunConfig, feed: Feed, model: Any) -> Loss:
    if parts.loss == "unsloth-mlx":
        return _mlx_loss.unsloth(config, model)
    return _mlx_loss.mlx_lm(config, feed) if parts.loss == "mlx-lm" else _mlx_loss.masked(config)


def _refuse(config: RunConfig) -> None:
    if config.model.attention != "default":
        raise BadConfig("model.attention: MLX has one implementation", 'use model.attention = "default"')
    if config.train.autocast == "bfloat16":
        raise BadConfig("train.autocast: MLX has no autocast", 'use model.dtype = "bfloat16"')


def _need_unsloth(parts: Parts) -> None:
    if "unsloth-mlx" in (parts.loader, parts.loss, parts.loop):
        from scenarios.paths import path_info

        missing = path_info("unsloth-mlx").missing()
        if missing:
            raise PathUnavailable(f"a part of unsloth-mlx needs {', '.join(missing)}", path_info("unsloth-mlx").fix)
        from scenarios.paths.unsloth_mlx import allow_without_gpu

        allow_without_gpu()
