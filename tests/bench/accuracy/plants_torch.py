"""Plants in the loop of the path `torch`: backward hooks, the loss, one frozen weight, the clip, an AdamW that misbehaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.bench.accuracy import plants_forward
from tracer.names import NameMap

LOOP = "scenarios.paths.torch_loop"
_names = NameMap()


def plant(plan: Mapping[str, Any], patch: Callable[..., None], tamper: Callable[..., Any]) -> None:
    """Patch the loop's namespace."""
    if {"grad", "loss", "base", "forward"} & set(plan):
        patch(f"{LOOP}.build_model", lambda build: lambda *given: _model(build(*given), plan, tamper))
    if "positions" in plan:
        patch(f"{LOOP}._tensors", lambda tensors: _positioned(tensors, plan["positions"]))
    if "mode" in plan:
        models: list[Any] = []
        patch(f"{LOOP}.build_model", lambda build: lambda *given: models.append(build(*given)) or models[0])
        patch(f"{LOOP}._tensors", lambda tensors: _evaluating(tensors, models, plan["mode"]))
    if "clip" in plan:
        patch(f"{LOOP}.clip_gradients", lambda clip: _clip(clip, plan["clip"]))
    if "library" in plan:
        name, options = plan["library"]["torch"]
        patch(f"{LOOP}.optimizer_of", lambda _: lambda _settings: (_optimizer(name), options))
    if "optimizer" in plan:
        patch(
            f"{LOOP}.optimizer_of",
            lambda of: lambda settings: (adamw(), {**of(settings)[1], "plan": plan["optimizer"]}),
        )


def _optimizer(name: str) -> type[Any]:
    """A class of torch.optim, or `transformers.Adafactor`."""
    import torch
    import transformers

    library, _, kind = name.rpartition(".")
    found: type[Any] = getattr(transformers if library else torch.optim, kind)
    return found


def _model(model: Any, plan: Mapping[str, Any], tamper: Callable[..., Any]) -> Any:
    import torch

    if "base" in plan:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if _names(name).name == plan["base"]["name"]:
                    parameter.mul_(plan["base"]["factor"])
    if "grad" in plan:
        _tamper_gradients(model, tamper)
    if "loss" in plan:
        inner = model.base_model.model
        inner.loss_function = _loss(inner.loss_function, plan["loss"])
    plants_forward.in_torch(model, plan.get("forward", ()))
    return model


def _positioned(original: Callable[..., dict[str, Any]], fault: Mapping[str, Any]) -> Callable[..., dict[str, Any]]:
    """The batch as tensors, with the positions of its tokens."""
    import torch

    step = 0

    def tensors(*given: Any) -> dict[str, Any]:
        nonlocal step
        step += 1
        batch = original(*given)
        positions = torch.arange(batch["input_ids"].shape[1]).expand(batch["input_ids"].shape).clone()
        if step >= fault.get("from", 1) and fault["form"] == "offset":
            positions += fault["by"]
        elif step >= fault.get("from", 1) and fault["form"] == "restart":
            positions[:, fault["at"] :] -= fault["at"]
        return {**batch, "position_ids": positions}

    return tensors


def _evaluating(original: Callable[..., Any], models: Sequence[Any], fault: Mapping[str, Any]) -> Callable[..., Any]:
    """The batch as tensors; from a step on the model that gets it has been left in evaluation mode."""
    step = 0

    def tensors(*given: Any) -> Any:
        nonlocal step
        step += 1
        if step >= fault.get("from", 1):
            models[0].eval()
        return original(*given)

    return tensors


def _tamper_gradients(model: Any, tamper: Callable[..., Any]) -> None:
    """Change gradients where backward leaves them.  One micro-batch a step: the step is the number of forwards."""
    import torch

    step = 0

    def count(*_: Any) -> None:
        nonlocal step
        step += 1

    def hook(name: str) -> Callable[[Any], None]:
        def after(parameter: Any) -> None:
            changed = tamper(step, name, parameter.grad.numpy())
            if changed is None:
                parameter.grad = None
            else:
                parameter.grad.copy_(torch.from_numpy(changed))

        return after

    model.register_forward_pre_hook(count)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(hook(_names(name).name))


def _loss(original: Callable[..., Any], fault: Mapping[str, Any]) -> Callable[..., Any]:
    import torch

    step = 0

    def loss(logits: Any, labels: Any, vocab_size: int, **more: Any) -> Any:
        nonlocal step
        step += 1
        if step < fault.get("from", 1):
            return original(logits, labels, vocab_size=vocab_size, **more)
        if "shift" in fault:  # position t is to predict another token than the next
            flat = torch.nn.functional.pad(labels, (0, fault["shift"]), value=-100)[:, fault["shift"] :].reshape(-1)
            return torch.nn.functional.cross_entropy(logits.float().reshape(-1, vocab_size), flat)
        if "dtype" in fault:
            kind = getattr(torch, fault["dtype"])
            flat = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
            return torch.nn.functional.cross_entropy(logits.to(kind).reshape(-1, vocab_size), flat).float()
        value = original(logits, labels, vocab_size=vocab_size, **more)
        tokens = (labels[:, 1:] != -100).sum()
        whole = {"rows": labels.shape[0], "all": labels[:, 1:].numel()}
        return value * fault["factor"] if "factor" in fault else value * tokens / whole[fault["denominator"]]

    return loss


def _clip(original: Callable[..., None], fault: Mapping[str, Any]) -> Callable[..., None]:
    """The loop's clip, and from a step on another one."""
    from scenarios.config import ClipConfig

    step = 0

    def clip(parameters: list[Any], settings: ClipConfig) -> None:
        nonlocal step
        step += 1
        given = ClipConfig(fault["mode"], fault.get("value", 1.0))
        original(parameters, given if step >= fault.get("from", 1) else settings)

    return clip


def adamw() -> type[Any]:
    """AdamW whose groups record what they were given and which does what `plan` says."""
    import torch

    class AdamW(torch.optim.Optimizer):  # type: ignore[misc]
        def __init__(self, params: Any, plan: Mapping[str, Any], **options: Any) -> None:
            self.plan, self.made = plan, 0
            params = list(params)
            if "unheld" in plan:
                first, every = plan["unheld"]
                del params[first::every]
            if "groups" in plan:
                first, every = plan["groups"]
                mine = params[first::every]
                rest = [p for p in params if all(p is not q for q in mine)]
                params = [{"params": rest}, {"params": mine, "weight_decay": options["weight_decay"] + 0.01}]
            super().__init__(params, options)

        @torch.no_grad()  # type: ignore[untyped-decorator]
        def step(self, closure: Any = None) -> None:
            self.made += 1
            for group in self.param_groups:
                for number, parameter in enumerate(group["params"]):
                    if parameter.grad is not None:
                        self._update(parameter, group, number)

        def _update(self, p: Any, group: Mapping[str, Any], number: int) -> None:
            plan = self.plan if self.made >= self.plan.get("from", 1) else {}
            state = self.state[p]
            if not state or (self.made == plan.get("reset_at") and number in plan.get("numbers", [number])):
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            t, g, lr = float(state["step"]), p.grad, group["lr"] * plan.get("lr", 1.0)
            beta1, beta2 = plan.get("beta1", group["betas"][0]), plan.get("beta2", group["betas"][1])
            eps, place = plan.get("eps", group["eps"]), plan.get("eps_place", "outside")
            decay = plan.get("decay", group["weight_decay"]) if number in plan.get("decayed", [number]) else 0.0
            if plan.get("coupled"):
                g = g + decay * p
            else:
                p.mul_(1 - lr * decay)
            m, v = state["exp_avg"], state["exp_avg_sq"]
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            c1, c2 = (1 - beta1**t, 1 - beta2**t) if plan.get("corrected", True) else (1.0, 1.0)
            if place == "outside":
                root = (v / c2).sqrt() + eps
            elif place == "inside":
                root = (v / c2 + eps).sqrt()
            else:
                root = (v.sqrt() + eps) / c2**0.5
            if not (plan.get("unwritten") and number in plan.get("numbers", [number])):
                p.addcdiv_(m / c1, root, value=-lr)
            if self.made == plan.get("element_at") and number == plan["element"]:
                p.view(-1)[plan["flat"]] += plan["by"]

    return AdamW
