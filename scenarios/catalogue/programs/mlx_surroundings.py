"""The MLX loop with things around it that were suspected of changing it: a wired limit, another library imported first."""

from __future__ import annotations

import importlib
from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = MLX


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `wired_limit`, set as mlx-lm does it; `imports`, modules that are imported before."""
    for name in options.get("imports", ()):
        importlib.import_module(name)
    if options.get("wired_limit"):
        import mlx.core as mx

        if mx.metal.is_available():
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        else:
            mx.set_cache_limit(1 << 28)
    from scenarios.paths import mlx_loop

    mlx_loop.run(config, feed)
