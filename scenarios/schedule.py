"""Learning-rate schedules: the factor of the peak rate at update k (1-based), as transformers defines them.

    warm-up (k-1 < w)    (k-1) / w
    linear               max(0, (T - (k-1)) / (T - w))
    cosine               ½ (1 + cos(π · ((k-1) - w) / (T - w)))
    constant             1

T is the number of steps and w that of warm-up steps.  Source: transformers/optimization.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scenarios.config import RunConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """Shape of the learning rate; `factor(k - 1)` is the multiple of the peak used in update k."""

    kind: str
    warmup: int
    steps: int

    @property
    def constant(self) -> bool:
        """Whether the rate never changes."""
        return self.kind == "constant" and self.warmup == 0

    def factor(self, done: int) -> float:
        """Factor after `done` updates, in double precision."""
        if done < self.warmup:
            return done / max(1, self.warmup)
        span = max(1, self.steps - self.warmup)
        if self.kind == "linear":
            return max(0.0, (self.steps - done) / span)
        if self.kind == "cosine":
            return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (done - self.warmup) / span)))
        return 1.0

    def in_graph(self, peak: float, mx: Any) -> Callable[[Any], Any]:
        """The same as a function of an array of steps, for a compiled MLX step; float32, `mx` is `mlx.core`."""
        span = max(1, self.steps - self.warmup)

        def rate(step: Any) -> Any:
            done = step.astype(mx.float32)
            rising = done * (peak / max(1, self.warmup))
            if self.kind == "linear":
                after = mx.maximum((self.steps - done) * (peak / span), 0.0)
            elif self.kind == "cosine":
                after = mx.maximum((1.0 + mx.cos((done - self.warmup) * (math.pi / span))) * (0.5 * peak), 0.0)
            else:
                after = mx.full(done.shape, peak, mx.float32)
            return mx.where(done < self.warmup, rising, after)

        return rate


def schedule_of(config: RunConfig) -> Schedule:
    """Schedule of a run configuration."""
    return Schedule(config.optimizer.schedule, config.optimizer.warmup, config.train.steps)
