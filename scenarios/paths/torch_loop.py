"""Path `torch`: a training loop in plain PyTorch over a PEFT model.

Notable: the gradient of a step is the mean over its micro-batches of each one's mean over its tokens, which is what
mlx-lm's train() does too (HF's Trainer weights by tokens).  Each micro-batch's own mean loss is differentiated and the
accumulated gradient divided once, so a loss reads the same whatever the accumulation.
"""

from __future__ import annotations

from typing import Any

from scenarios.config import ClipConfig, RunConfig
from scenarios.data import MicroBatch
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from scenarios.paths._torch import build_model, optimizer_of, outcome_of
from scenarios.schedule import schedule_of


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train on the batches of `feed`."""
    import torch

    device = _device(config.train.device)
    model = build_model(config, feed).to(device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind, options = optimizer_of(config.optimizer)
    optimizer = kind(parameters, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_of(config).factor)
    forward = torch.compile(model) if config.train.compile is True else model
    losses: list[Any] = []
    assert feed.steps is not None
    for micro_batches in feed.steps:
        for micro_batch in micro_batches:
            loss = forward(**_tensors(micro_batch, device)).loss
            loss.backward()
            losses.append(loss.detach())
        _average(parameters, len(micro_batches))
        _clip(parameters, config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return outcome_of(model, optimizer, losses)


def _device(name: str) -> Any:
    import torch

    accelerator = None if name == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    return accelerator or torch.device("cpu")


def _tensors(micro_batch: MicroBatch, device: Any) -> dict[str, Any]:
    import torch

    arrays = {"input_ids": micro_batch.input_ids, "labels": micro_batch.labels}
    if micro_batch.attention_mask is not None:
        arrays["attention_mask"] = micro_batch.attention_mask
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _average(parameters: list[Any], micro_batches: int) -> None:
    if micro_batches > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(micro_batches)


def _clip(parameters: list[Any], clip: ClipConfig) -> None:
    import torch

    if clip.mode == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, clip.value)
    elif clip.mode == "value":
        torch.nn.utils.clip_grad_value_(parameters, clip.value)
