"""What the PyTorch paths share: base model, adapter, optimizer, outcome.

transformers loads, PEFT adapts, torch optimizes; nothing here knows of a recorder.  torch's Adam always corrects its
bias, so for `optimizer.bias_correction = false` a small optimizer is written out below.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from scenarios.config import ClipConfig, ModelConfig, OptimizerConfig, PartsConfig, RunConfig
from scenarios.feed import Feed, placed
from scenarios.models import model_source
from scenarios.outcome import Outcome, numpy_state
from tracer.errors import BadConfig


def seed_everything(seed: int) -> None:
    """As transformers.set_seed: Python, numpy and torch."""
    from transformers import set_seed

    set_seed(seed)


def build_model(config: RunConfig, feed: Feed) -> Any:
    """Base model with a PEFT LoRA adapter in training mode, seeded where `train.seed_at` says."""
    base = load_base(config)
    model = _adapt(base, config)
    if feed.adapters is not None:
        set_adapters(model, feed)
    return model.train()


def load_base(config: RunConfig) -> Any:
    """Base model, seeded where `train.seed_at` says."""
    from transformers import AutoModelForCausalLM

    _quiet()
    if config.train.seed_at == "before-load":
        seed_everything(config.train.seed)
    base = AutoModelForCausalLM.from_pretrained(model_source(config.model.name), **_loading(config.model))
    if config.train.seed_at == "after-load":
        seed_everything(config.train.seed)
    return base


def _quiet() -> None:
    """No progress bars: a path's output is its own, and a terminal is not assumed."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _loading(model: ModelConfig) -> dict[str, Any]:
    """Arguments of transformers' loader beside the name."""
    import torch

    options: dict[str, Any] = {}
    if model.dtype != "library":
        options["dtype"] = "auto" if model.dtype == "checkpoint" else getattr(torch, model.dtype)
    if model.attention != "default":
        options["attn_implementation"] = model.attention
    return options


def _adapt(base: Any, config: RunConfig) -> Any:
    from peft import get_peft_model

    try:
        return get_peft_model(base, adapter_settings(base, config))
    except ValueError as error:
        raise BadConfig(f"lora: PEFT does not accept this adapter: {error}") from error


def adapter_settings(base: Any, config: RunConfig) -> Any:
    """PEFT's configuration of the adapter."""
    from peft import LoraConfig

    lora = config.lora
    count = base.config.get_text_config().num_hidden_layers
    last = count if lora.layers == "all" else min(int(lora.layers), count)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha if isinstance(lora.scale, str) else lora.scale * lora.rank,
        lora_dropout=lora.dropout,
        target_modules=_targets(base, lora.targets),
        layers_to_transform=None if last == count else list(range(count - last, count)),
        task_type="CAUSAL_LM",
    )


def _targets(base: Any, targets: str | tuple[str, ...]) -> list[str]:
    """Module names; "linear" is every linear layer inside a decoder layer (PEFT's "all-linear" allows no layer choice)."""
    import torch

    if targets != "linear":
        return list(targets)
    inside = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name]
    return sorted({name.rpartition(".")[2] for name in inside})


def set_adapters(model: Any, feed: Feed) -> None:
    """Set the adapters that the feed gives, in the model's own layout and dtype."""
    import torch

    assert feed.adapters is not None
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    given = placed(feed.adapters, [(name, tuple(p.shape)) for name, p in trainable.items()])
    with torch.no_grad():
        for name, data in given.items():
            trainable[name].copy_(torch.from_numpy(data))


def refuse_parts(config: RunConfig) -> None:
    """Raises BadConfig for a hybrid: its parts are those of the MLX paths."""
    if config.parts != PartsConfig():
        raise BadConfig("parts: this path has no parts to exchange", "they are settings of the MLX paths")


def clip_gradients(parameters: Sequence[Any], clip: ClipConfig) -> None:
    """Clip the gradients in place as configured, with torch's own functions."""
    import torch

    if clip.mode == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, clip.value)
    elif clip.mode == "value":
        torch.nn.utils.clip_grad_value_(parameters, clip.value)
    elif clip.mode == "tensor":
        for parameter in parameters:
            torch.nn.utils.clip_grad_norm_([parameter], clip.value)


def optimizer_of(settings: OptimizerConfig) -> tuple[type[Any], dict[str, Any]]:
    """Optimizer class and keyword arguments, without the parameters.

    adam with a weight decay is torch's: the decay is added to the gradient (coupled).
    """
    import torch

    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.name == "sgd":
        return torch.optim.SGD, common
    adam = common | {"betas": settings.betas, "eps": settings.eps}
    if not settings.bias_correction:
        return uncorrected_adam(), adam | {"decoupled": settings.name == "adamw"}
    return (torch.optim.AdamW if settings.name == "adamw" else torch.optim.Adam), adam


def uncorrected_adam() -> type[Any]:
    """Adam and AdamW without bias correction: m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g², w ← w - lr·m / (√v + ε).

    Weight decay is decoupled, w ← w(1 - lr·λ), or added to the gradient.
    """
    import torch

    class UncorrectedAdam(torch.optim.Optimizer):  # type: ignore[misc]
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, {**options, "bias_correction": False})

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)
            return loss

        def _update(self, parameter: Any, group: dict[str, Any]) -> None:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            (beta1, beta2), gradient = group["betas"], parameter.grad
            if group["decoupled"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            elif group["weight_decay"]:
                gradient = gradient + group["weight_decay"] * parameter
            state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-group["lr"])

    return UncorrectedAdam


def outcome_of(model: Any, optimizer: Any, losses: list[Any]) -> Outcome:
    """End of a run: trainable parameters, optimizer state by parameter name, states of the random generators."""
    import torch

    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    parameters = {name: _array(p) for name, p in model.named_parameters() if p.requires_grad}
    state = {
        f"{names[id(p)]}/{kind}": _array(value) if torch.is_tensor(value) else np.array(value)
        for p, kinds in optimizer.state.items()
        for kind, value in kinds.items()
    }
    return Outcome(tuple(float(loss) for loss in losses), parameters, state, _rng())


def _rng() -> dict[str, npt.NDArray[Any]]:
    import torch

    return {
        "torch": torch.get_rng_state().numpy().copy(),
        "numpy": numpy_state(),
        "python": np.array(random.getstate()[1], np.uint64),
    }


def _array(tensor: Any) -> npt.NDArray[Any]:
    import torch

    tensor = tensor.detach().cpu()
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    result: npt.NDArray[Any] = bits.numpy().copy()
    return result
