"""A trainer that resolves two clip settings into one, as unsloth-zoo's MLX trainer did before its pull request 671.

`max_grad_value` None becomes 1.0 unless a norm is given, and a value that is not 0 wins over a norm; neither is declared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import ClipConfig, RunConfig
from scenarios.feed import Feed

NEEDS = MLX
BESIDE = "mlx"
_DEFAULT = 1.0


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `max_grad_value` (None if it is left out) and `max_grad_norm`."""
    from scenarios.paths import mlx_loop

    clip = resolve(options.get("max_grad_value"), options["max_grad_norm"])
    mlx_loop.run(replace(config, clip=clip), feed)


def resolve(value: float | None, norm: float) -> ClipConfig:
    """The effective clip of a pair of settings."""
    if value is None:
        value = 0.0 if norm else _DEFAULT
    if value:
        return ClipConfig("value", value)
    return ClipConfig("norm", norm) if norm else ClipConfig("none")
