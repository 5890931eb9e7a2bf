"""AdamW written out, for what torch's own cannot be told to do.

w ← w − lr · √(1 − β₂ᵗ) / (1 − β₁ᵗ) · m / (√v + ε)          transformers.optimization.AdamW, until 4.x
w ← w − lr / (1 − β₁ᵗ) · m / (√(v / (1 − β₂ᵗ)) + ε)           torch.optim.AdamW: `eps_late`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from scenarios.config import OptimizerConfig


def written_adamw(
    settings: OptimizerConfig,
    parameters: Iterable[Any],
    *,
    eps_late: bool = True,
    writes: Callable[[Any], bool] = lambda _: True,
) -> Any:
    """An optimizer; a parameter that `writes` is false for keeps its value, its moments do not."""
    import torch

    class AdamW(torch.optim.Optimizer):  # type: ignore[misc]
        @torch.no_grad()  # type: ignore[untyped-decorator]
        def step(self, _closure: Any = None) -> None:
            for group in self.param_groups:
                for p in (p for p in group["params"] if p.grad is not None):
                    self._update(p, group)

        def _update(self, p: Any, group: dict[str, Any]) -> None:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            (beta1, beta2), t = group["betas"], float(state["step"])
            m, v = state["exp_avg"], state["exp_avg_sq"]
            m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            root = math.sqrt(1 - beta2**t)
            eps = group["eps"] * root if eps_late else group["eps"]
            target = p if writes(p) else p.clone()
            target.mul_(1 - group["lr"] * group["weight_decay"])
            target.addcdiv_(m, v.sqrt().add_(eps), value=-group["lr"] * root / (1 - beta1**t))

    given = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps, "weight_decay": settings.weight_decay}
    return AdamW(parameters, given)
