"""Constants of a model in low precision, or another formula: rotary tables in bfloat16, GELU exact where tanh is meant, a loss of
logits in bfloat16.

Positions up to 256 fit into bfloat16's 8 significant bits, angles do not: the error of a phase grows with its position.
"""

from __future__ import annotations

from typing import Any

from scenarios.catalogue.programs import TORCH, loops
from scenarios.config import RunConfig
from scenarios.data import IGNORED, MicroBatch
from scenarios.feed import Feed

NEEDS = TORCH
BESIDE = "torch"


def run(config: RunConfig, feed: Feed, **options: Any) -> None:
    """Options: `rope` (`bfloat16`), the dtype in which angles are computed; `gelu` (`exact`); `loss` (`bfloat16`), the dtype of
    the logits that the loss is taken of."""
    from torch import nn

    from scenarios.paths._torch import build_model

    model = build_model(config, feed)
    if options.get("rope"):
        _round_angles(model, options["rope"])
    if options.get("gelu") == "exact":
        for module in model.modules():
            if type(module).__name__.endswith("MLP"):
                module.act_fn = nn.GELU()
    loss = _half_loss if options.get("loss") == "bfloat16" else loops.plain_loss
    loops.train(config, feed, model, loops.adamw(config, model), loss=loss)


def _half_loss(model: Any, batch: MicroBatch) -> Any:
    """Cross-entropy of the logits as bfloat16."""
    import torch

    given = loops.tensors(batch)
    labels = given.pop("labels")[:, 1:].flatten()
    logits = model(**given).logits[:, :-1].flatten(0, 1).bfloat16()
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED).float()


def _round_angles(model: Any, dtype: str) -> None:
    """Make the rotary embedding compute angles, cosines and sines in a dtype."""
    import torch

    low = getattr(torch, dtype)
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))

    def forward(x: Any, position_ids: Any, *_: Any) -> tuple[Any, Any]:
        angles = position_ids[..., None].to(low) * rotary.inv_freq.to(low)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    rotary.forward = forward
