"""What the MLX paths share: mlx-lm's loader and adapter, the optimizer, outcome.

mlx-lm loads and adapts, mlx optimizes; nothing here knows of a recorder.  MLX has no clipping in its optimizers, so
a run that clips uses a subclass whose `update` clips first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from scenarios.config import ClipConfig, RunConfig
from scenarios.feed import Feed, placed
from scenarios.models import model_source
from scenarios.outcome import Outcome, numpy_state
from scenarios.schedule import schedule_of
from tracer.errors import BadConfig


def load_mlx_lm(config: RunConfig, feed: Feed) -> tuple[Any, Any]:
    """Base model with LoRA layers in training mode, seeded where `train.seed_at` says, and its tokenizer.

    Every layer that is built draws from MLX's generator, so the adapter's draw depends on that place.
    """
    import mlx.core as mx
    import mlx_lm

    if config.train.seed_at == "before-load":
        seed(config.train.seed)
    model, tokenizer = mlx_lm.load(model_source(config.model.name))[:2]
    if config.model.dtype not in ("checkpoint", "library"):
        model.set_dtype(getattr(mx, config.model.dtype))
    if config.train.seed_at == "after-load":
        seed(config.train.seed)
    model.freeze()
    _adapt(model, config)
    if feed.adapters is not None:
        set_adapters(model, feed)
    model.train()
    return model, tokenizer


def seed(number: int) -> None:
    """Seed MLX's generator, and numpy's, with which mlx-lm orders its batches."""
    import mlx.core as mx

    np.random.seed(number)
    mx.random.seed(number)


def _adapt(model: Any, config: RunConfig) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    lora = config.lora
    count = len(model.layers)
    layers = count if lora.layers == "all" else min(int(lora.layers), count)
    settings: dict[str, Any] = {"rank": lora.rank, "scale": lora.effective_scale, "dropout": lora.dropout}
    if lora.targets != "linear":
        settings["keys"] = _keys(model, lora.targets)
    linear_to_lora_layers(model, layers, settings)


def _keys(model: Any, targets: str | tuple[str, ...]) -> list[str]:
    """Paths inside a layer, `self_attn.q_proj`; raises BadConfig for a target that no layer has."""
    inside = {name for layer in model.layers for name, _ in layer.named_modules()}
    keys = sorted(name for name in inside if name.rpartition(".")[2] in targets)
    absent = [target for target in targets if not any(key.rpartition(".")[2] == target for key in keys)]
    if absent:
        raise BadConfig(f"lora.targets: no layer of this model has {', '.join(absent)}")
    return keys


def set_adapters(model: Any, feed: Feed) -> None:
    """Set the adapters that the feed gives, in the model's own layout and dtype."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    assert feed.adapters is not None
    trainable = dict(tree_flatten(model.trainable_parameters()))
    given = placed(feed.adapters, [(name, tuple(p.shape)) for name, p in trainable.items()])
    weights = [(name, mx.array(data).astype(trainable[name].dtype)) for name, data in given.items()]
    model.load_weights(weights, strict=False)
    mx.eval(model.parameters())


def build_optimizer(config: RunConfig) -> Any:
    """Optimizer as configured; raises BadConfig for what MLX's own does not have."""
    import mlx.optimizers as optim

    settings = config.optimizer
    schedule = schedule_of(config)
    if settings.name == "adam" and settings.weight_decay:
        raise BadConfig("optimizer.weight_decay: MLX's Adam has none", 'use optimizer.name = "adamw"')
    options: dict[str, Any] = {"learning_rate": settings.lr if schedule.constant else _rate(config)}
    if settings.name != "adam":
        options["weight_decay"] = settings.weight_decay
    if settings.name != "sgd":
        options |= {
            "betas": list(settings.betas),
            "eps": settings.eps,
            "bias_correction": settings.bias_correction,
        }
    kind = {"adamw": optim.AdamW, "adam": optim.Adam, "sgd": optim.SGD}[settings.name]
    return _clipping(kind, config.clip)(**options)


def _rate(config: RunConfig) -> Any:
    import mlx.core as mx

    return schedule_of(config).in_graph(config.optimizer.lr, mx)


def _clipping(kind: type[Any], clip: ClipConfig) -> type[Any]:
    """The optimizer class, with a clip before each update if one is asked for."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_map

    clips = {
        "norm": lambda gradients: optim.clip_grad_norm(gradients, clip.value)[0],
        "value": lambda gradients: tree_map(lambda g: mx.clip(g, -clip.value, clip.value), gradients),
        "tensor": lambda gradients: tree_map(lambda g: optim.clip_grad_norm([g], clip.value)[0][0], gradients),
    }
    if clip.mode not in clips:
        return kind

    class Clipped(kind):  # type: ignore[misc]
        def update(self, model: Any, gradients: Any) -> None:
            super().update(model, clips[clip.mode](gradients))

    Clipped.__name__ = Clipped.__qualname__ = f"Clipped{kind.__name__}"
    return Clipped


def outcome_of(model: Any, optimizer: Any, losses: list[Any]) -> Outcome:
    """End of a run: trainable parameters, optimizer state, states of the random generators."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    parameters = {name: _array(p) for name, p in tree_flatten(model.trainable_parameters())}
    state = {name: _array(value) for name, value in tree_flatten(optimizer.state) if isinstance(value, mx.array)}
    generator: Any = mx.random.state
    rng = {"mlx": _array(generator[0]), "numpy": numpy_state()}
    return Outcome(tuple(float(loss) for loss in losses), parameters, state, rng)


def _array(array: Any) -> npt.NDArray[Any]:
    import mlx.core as mx

    result: npt.NDArray[Any] = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    return result
