"""PyTorch's Adamax ported to MLX as a subclass of `mlx.optimizers.Adamax`, which corrects no bias.

u ← max(β₂u, |g| + ε)      w ← w − lr / (1 − β₁ᵗ) · m / u          torch.optim.Adamax
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = MLX
BESIDE = "mlx"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `corrected`: whether the port has the correction of the first moment."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx import nn

    from scenarios.paths._mlx import load_mlx_lm
    from scenarios.paths._mlx_loss import masked_loss

    class Adamax(optim.Adamax):  # type: ignore[misc]
        def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
            beta1, beta2 = self.betas
            state["m"] = beta1 * state["m"] + (1 - beta1) * gradient
            state["v"] = mx.maximum(beta2 * state["v"], mx.abs(gradient) + self.eps)
            correction = 1 - beta1**self.step if options.get("corrected") else 1.0
            return parameter - self.learning_rate / correction * state["m"] / state["v"]

    model, _ = load_mlx_lm(config, feed)
    settings = config.optimizer
    optimizer = Adamax(learning_rate=settings.lr, betas=list(settings.betas), eps=settings.eps)
    loss_and_gradient = nn.value_and_grad(model, masked_loss)
    for batch in feed.each():
        _, gradient = loss_and_gradient(model, mx.array(batch.input_ids), mx.array(batch.labels))
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)
