"""An update that is written into a temporary where a parameter is not contiguous, as `addcdiv_` did on Apple's MPS.

Gradient and moments are right; the parameter stays what it was.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.catalogue.programs.adamw import written_adamw
from scenarios.config import RunConfig
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"
_NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Option `lost` (true): whether the update of a parameter that is not contiguous gets lost."""
    from scenarios.paths._torch import build_model

    model = build_model(config, feed)
    parameter = dict(model.named_parameters())[_NAME]
    parameter.data = parameter.data.t().contiguous().t()  # the same values, columns first
    lost = options.get("lost", True)

    def writes(p: Any) -> bool:
        return bool(p.is_contiguous()) or not lost

    optimizer = written_adamw(config.optimizer, loops.trainable(model), writes=writes)
    loops.train(config, feed, model, optimizer)
