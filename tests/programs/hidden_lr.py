"""A training path whose MLX optimizer takes steps 1 % longer than its own learning rate says: `hidden_lr.py mlx …`."""

from __future__ import annotations

import runpy
from typing import Any

import mlx.optimizers as optim


class AdamW(optim.AdamW):
    """AdamW that multiplies its update by 1.01."""

    def apply_single(self, gradient: Any, parameter: Any, state: dict[str, Any]) -> Any:
        return parameter + 1.01 * (super().apply_single(gradient, parameter, state) - parameter)


if __name__ == "__main__":
    optim.AdamW = AdamW  # type: ignore[misc]
    runpy.run_module("scenarios.run", run_name="__main__", alter_sys=True)
