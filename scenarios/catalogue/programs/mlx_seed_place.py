"""A `get_peft_model` of MLX that seeds at its top, or right before the adapters are built.

Between the two it builds a layer that it then drops, as a wrapper does that looks at what a layer of its base model is
like; in MLX every Linear draws its weights from the generator when it is built.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import MLX
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = MLX
BESIDE = "mlx"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `at_top` (true): where the seed is set."""
    import mlx.core as mx
    import mlx_lm
    from mlx import nn
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from scenarios.models import model_source
    from scenarios.paths import _mlx_loss, mlx_loop

    def get_peft_model(model: Any) -> Any:
        at_top = options.get("at_top", True)
        if at_top:
            mx.random.seed(config.train.seed)
        nn.Linear(model.args.hidden_size, model.args.hidden_size)
        if not at_top:
            mx.random.seed(config.train.seed)
        model.freeze()
        lora = {"rank": config.lora.rank, "scale": config.lora.effective_scale, "dropout": config.lora.dropout}
        linear_to_lora_layers(model, len(model.layers), lora)
        return model.train()

    model = get_peft_model(mlx_lm.load(model_source(config.model.name))[0])
    mlx_loop.train(config, feed, model, _mlx_loss.masked(config))
