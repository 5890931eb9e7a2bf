"""Plants in the loop of the path `mlx`, which must run eagerly: the step number is counted in Python.

A gradient is changed in the backward pass, by an identity whose vector-Jacobian product is the change.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tests.bench.accuracy import plants_forward
from tracer.names import NameMap

LOOP = "scenarios.paths.mlx_loop"
LOSS = "scenarios.paths._mlx_loss.masked_loss"
_names = NameMap()


def plant(plan: Mapping[str, Any], patch: Callable[..., None], tamper: Callable[..., Any]) -> None:
    """Patch the loop's namespace."""
    if "base" in plan:
        patch("scenarios.paths._mlx_parts._load", lambda load: lambda *given: _scaled_base(load(*given), plan["base"]))
    if "forward" in plan:
        clock = plants_forward.Clock()
        patch(LOSS, clock.counting)
        patch("scenarios.paths._mlx_parts._load", lambda load: plants_forward.in_mlx(load, plan["forward"], clock))
    if "loss" in plan:
        patch(LOSS, lambda loss: _loss(loss, plan["loss"]))
    if "grad" in plan:
        patch(LOSS, lambda loss: _tampered(loss, tamper))
    if "clip" in plan:
        patch("scenarios.paths._mlx._clipping", lambda make: _clipping(make, plan["clip"]))
    if "library" in plan:
        name, options = plan["library"]["mlx"]
        patch(f"{LOOP}.build_optimizer", lambda _: lambda _config: _optimizer(name, options))
    if "optimizer" in plan:
        patch("scenarios.paths._mlx._clipping", lambda _: lambda kind, _clip: adamw(kind, plan["optimizer"]))


def _optimizer(name: str, options: Mapping[str, Any]) -> Any:
    import mlx.optimizers as optim

    return getattr(optim, name)(**options)


def _scaled_base(loaded: tuple[Any, Any], base: Mapping[str, Any]) -> tuple[Any, Any]:
    """A model and its tokenizer, one weight of the model multiplied."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model, tokenizer = loaded
    found = [(n, w) for n, w in tree_flatten(model.parameters()) if _names(n).name == base["name"]]
    model.load_weights([(name, weight * base["factor"]) for name, weight in found], strict=False)
    mx.eval(model.parameters())
    return model, tokenizer


def _loss(original: Callable[..., Any], fault: Mapping[str, Any]) -> Callable[..., Any]:
    import mlx.core as mx
    import mlx.nn as nn

    step = 0

    @functools.wraps(original)
    def loss(model: Any, input_ids: Any, labels: Any) -> tuple[Any, Any]:
        nonlocal step
        step += 1
        if step < fault.get("from", 1):
            result: tuple[Any, Any] = original(model, input_ids, labels)
            return result
        if "dtype" in fault:
            logits, targets = model(input_ids[:, :-1]).astype(getattr(mx, fault["dtype"])), labels[:, 1:]
            kept = targets != -100
            each = nn.losses.cross_entropy(logits, mx.where(kept, targets, 0)) * kept
            return (each.sum() / kept.sum().astype(each.dtype)).astype(mx.float32), kept.sum()
        value, count = original(model, input_ids, labels)
        whole = {"rows": labels.shape[0], "all": labels[:, 1:].size}
        return value * fault["factor"] if "factor" in fault else value * count / whole[fault["denominator"]], count

    return loss


def _tampered(original: Callable[..., Any], tamper: Callable[..., Any]) -> Callable[..., Any]:
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    step = 0

    def passed(name: str, value: Any) -> Any:
        canonical = _names(name)

        @mx.custom_function  # type: ignore[untyped-decorator]
        def same(x: Any) -> Any:
            return x * 1.0

        @same.vjp  # type: ignore[untyped-decorator]
        def back(primal: Any, cotangent: Any, _: Any) -> Any:
            gradient = np.array(cotangent)
            changed = tamper(step, canonical.name, gradient.T.copy() if canonical.transform else gradient)
            assert changed is not None, "MLX has no gradient that is none"
            return mx.array(np.ascontiguousarray(changed.T if canonical.transform else changed))

        return same(value)

    @functools.wraps(original)
    def loss(model: Any, input_ids: Any, labels: Any) -> tuple[Any, Any]:
        nonlocal step
        step += 1
        flat = tree_flatten(model.trainable_parameters())
        model.update(tree_unflatten([(name, passed(name, value)) for name, value in flat]))
        return original(model, input_ids, labels)

    return loss


def _clipping(make: Callable[..., type[Any]], fault: Mapping[str, Any]) -> Callable[..., type[Any]]:
    """What gives the optimizer class its clip: its own, and from a step on another one."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx.utils import tree_map

    value = fault.get("value", 1.0)
    clips = {
        "none": lambda gradients: gradients,
        "norm": lambda gradients: optim.clip_grad_norm(gradients, value)[0],
        "value": lambda gradients: tree_map(lambda g: mx.clip(g, -value, value), gradients),
        "tensor": lambda gradients: tree_map(
            lambda g: g * mx.minimum(1.0, value / (mx.sqrt(mx.square(g).sum()) + 1e-6)), gradients
        ),
    }
    step = 0

    def clipping(kind: type[Any], clip: Any) -> type[Any]:
        class Clipped(make(kind, clip)):  # type: ignore[misc]
            def update(self, model: Any, gradients: Any) -> None:
                nonlocal step
                step += 1
                if step >= fault.get("from", 1):
                    kind.update(self, model, clips[fault["mode"]](gradients))
                else:
                    super().update(model, gradients)

        return Clipped

    return clipping


def adamw(kind: type[Any], given: Mapping[str, Any]) -> type[Any]:
    """MLX's AdamW, whose attributes say what it was given and which does what the plan says."""
    import mlx.core as mx

    # Not attributes of the optimizer: numbers there are its settings to whoever looks.
    tally = {"made": 0, "number": 0}

    class AdamW(kind):  # type: ignore[misc]
        def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
            tally["made"] += 1
            tally["number"] = 0
            return super().apply_gradients(gradients, parameters)

        def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
            number, made = tally["number"], tally["made"]
            plan = given if made >= given.get("from", 1) else {}
            tally["number"] += 1
            if made == plan.get("reset_at") and number in plan.get("numbers", [number]):
                state["m"], state["v"] = mx.zeros_like(state["m"]), mx.zeros_like(state["v"])
            lr = self.learning_rate.astype(gradient.dtype) * plan.get("lr", 1.0)
            b1, b2 = plan.get("beta1", self.betas[0]), plan.get("beta2", self.betas[1])
            eps, place = plan.get("eps", self.eps), plan.get("eps_place", "outside")
            decay = plan.get("decay", self.weight_decay) if number in plan.get("decayed", [number]) else 0.0
            if plan.get("coupled"):
                gradient = gradient + decay * parameter
            else:
                parameter = parameter * (1 - lr * decay)
            m = b1 * state["m"] + (1 - b1) * gradient
            v = b2 * state["v"] + (1 - b2) * mx.square(gradient)
            state["m"], state["v"] = m, v
            c1, c2 = (1 - b1**made, 1 - b2**made) if plan.get("corrected", True) else (1.0, 1.0)
            if place == "outside":
                root = mx.sqrt(v / c2) + eps
            elif place == "inside":
                root = mx.sqrt(v / c2 + eps)
            else:
                root = (mx.sqrt(v) + eps) / c2**0.5
            if not (plan.get("unwritten") and number in plan.get("numbers", [number])):
                parameter = parameter - lr * (m / c1) / root
            if made == plan.get("element_at") and number == plan["element"]:
                flat = np.array(parameter)
                flat.reshape(-1)[plan["flat"]] += plan["by"]
                parameter = mx.array(flat)
            return parameter

    return AdamW
