"""Plants inside the model, in its forward pass: what a module gives, what LoRA adds, where the rotary embedding turns.

    {"op": "scale", "module", "by"}                      a module's output, times `by`
    {"op": "adapter", "module", "by"}                    what LoRA adds to a projection, times `by`
    {"op": "positions", "module", "by", "at"}            an attention's positions from `at` on, `by` further
    {"op": "rate", "module", "by"}                       an attention's positions, times `by`
    {"op": "angles", "module", "by"}                     an attention's rotary angles computed in the dtype `by`; PyTorch
    {"op": "base", "module", "by"}                       the base of the rotary table; PyTorch
    {"op": "activation", "module", "by"}                 another activation function; PyTorch

`module` is a glob over canonical names; that of the rotary table, which has `angles` too, is `model.rotary_emb`.  `steps` are
the first and last step with the fault, and a step is one forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from tracer.names import NameMap

Plan = Mapping[str, Any]
_names = NameMap()
_FOREVER = (1, 1 << 30)


@dataclass
class Clock:
    """Number of the forward pass under way."""

    step: int = 0

    def within(self, fault: Plan) -> bool:
        """Whether the fault is there in this step."""
        first, last = fault.get("steps", _FOREVER)
        return bool(first <= self.step <= last)

    def counting(self, loss: Callable[..., Any]) -> Callable[..., Any]:
        """The loss function, which begins a step each time it is called."""

        @functools.wraps(loss)
        def counted(*given: Any, **more: Any) -> Any:
            self.step += 1
            return loss(*given, **more)

        return counted


def in_torch(model: Any, faults: Sequence[Plan]) -> None:
    """Hook the modules of a PEFT model."""
    if not faults:
        return
    clock = Clock()

    def count(*_: Any) -> None:
        clock.step += 1

    model.register_forward_pre_hook(count)
    rotary = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    for path, module in model.named_modules():
        for fault in faults:
            if path and fnmatchcase(_names(path).name, fault["module"]):
                _hook(module, rotary, fault, clock)


def _hook(module: Any, rotary: Any, fault: Plan, clock: Clock) -> None:
    def scaled(_module: Any, _given: Any, output: Any) -> Any:
        return output * fault["by"] if clock.within(fault) else output

    def turned(_module: Any, given: tuple[Any, ...], more: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not clock.within(fault):
            return given, more
        hidden = given[0] if given else more["hidden_states"]
        return given, {**more, "position_embeddings": _cos_and_sin(rotary, hidden, fault)}

    def tables(_module: Any, given: tuple[Any, ...], _output: Any) -> Any:
        return _cos_and_sin(rotary, given[0], fault) if clock.within(fault) else None

    def activated(_module: Any, given: tuple[Any, ...], _output: Any) -> Any:
        return _activation(fault["by"])(given[0]) if clock.within(fault) else None

    if module is rotary:
        module.register_forward_hook(tables)
    elif fault["op"] == "activation":
        module.register_forward_hook(activated)
    elif fault["op"] == "scale":
        module.register_forward_hook(scaled)
    elif fault["op"] == "adapter":
        own = dict(module.scaling)
        module.register_forward_pre_hook(
            lambda *_: module.scaling.update(
                {name: scale * (fault["by"] if clock.within(fault) else 1.0) for name, scale in own.items()}
            )
        )
    else:
        module.register_forward_pre_hook(turned, with_kwargs=True)


def _cos_and_sin(rotary: Any, hidden: Any, fault: Plan) -> tuple[Any, Any]:
    """Rotary tables [1, L, head size] as transformers makes them, but for the fault."""
    import torch

    positions = torch.arange(hidden.shape[1], dtype=torch.float32)
    if fault["op"] == "positions":
        positions = positions + fault["by"] * (positions >= fault["at"])
    elif fault["op"] == "rate":
        positions = positions * fault["by"]
    rates = rotary.inv_freq.float()
    if fault["op"] == "base":
        rates = fault["by"] ** (-torch.arange(len(rates)) / len(rates))
    low = getattr(torch, fault["by"]) if fault["op"] == "angles" else torch.float32
    angles = (positions.to(low)[:, None] * rates.to(low)).float()
    both = torch.cat((angles, angles), dim=-1)[None]
    return both.cos().to(hidden.dtype), both.sin().to(hidden.dtype)


def _activation(name: str) -> Callable[[Any], Any]:
    """A function of torch: `gelu`, `gelu_tanh`, `silu`, `relu`."""
    import torch

    if name == "gelu_tanh":
        return functools.partial(torch.nn.functional.gelu, approximate="tanh")
    found: Callable[[Any], Any] = getattr(torch.nn.functional, name)
    return found


def in_mlx(load: Callable[..., Any], faults: Sequence[Plan], clock: Clock) -> Callable[..., Any]:
    """The function that loads mlx-lm's model with its LoRA layers; faults are planted in what it gives."""

    def loading(*given: Any) -> Any:
        model, tokenizer = load(*given)
        for path, module in list(model.named_modules()):
            for fault in faults:
                if path and fnmatchcase(_names(path).name, fault["module"]):
                    _replace_call(module, fault, clock)
        return model, tokenizer

    return loading


def _replace_call(module: Any, fault: Plan, clock: Clock) -> None:
    """Give the module, or its rotary embedding, a class of its own with another `__call__`."""
    changed = {"scale": _scaled, "adapter": _adapter, "positions": _further, "rate": _faster}[fault["op"]]
    target = module.rope if fault["op"] in ("positions", "rate") else module
    kind = type(target)

    def call(self: Any, *given: Any, **more: Any) -> Any:
        inner = functools.partial(kind.__call__, self)
        return changed(self, inner, fault, given, more) if clock.within(fault) else inner(*given, **more)

    target.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def _scaled(_: Any, inner: Callable[..., Any], fault: Plan, given: Any, more: Any) -> Any:
    return inner(*given, **more) * fault["by"]


def _adapter(module: Any, inner: Callable[..., Any], fault: Plan, given: Any, more: Any) -> Any:
    own = module.scale
    module.scale = own * fault["by"]
    try:
        return inner(*given, **more)
    finally:
        module.scale = own


def _further(_: Any, inner: Callable[..., Any], fault: Plan, given: Any, _more: Any) -> Any:
    import mlx.core as mx

    at = fault["at"]
    moved = inner(given[0], offset=fault["by"])
    return mx.concatenate([inner(given[0])[..., :at, :], moved[..., at:, :]], axis=-2)


def _faster(rope: Any, inner: Callable[..., Any], fault: Plan, given: Any, more: Any) -> Any:
    own = rope.scale
    rope.scale = own * fault["by"]
    try:
        return inner(*given, **more)
    finally:
        rope.scale = own
