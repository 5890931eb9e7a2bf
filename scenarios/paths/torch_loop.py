"""Path `torch`: a training loop in plain PyTorch over a PEFT model.

Notable: the gradient of a step is the mean over its micro-batches of each one's mean over its tokens, which is what
mlx-lm's train() does too (HF's Trainer weights by tokens).  Each micro-batch's own mean loss is differentiated and the
accumulated gradient divided once, so a loss reads the same whatever the accumulation.  With `loss.reduction =
"token-mean"` a micro-batch's loss is its sum over the tokens of the whole step, as in HF's Trainer.
"""

from __future__ import annotations

from typing import Any

from scenarios.config import RunConfig
from scenarios.data import IGNORED, MicroBatch
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from scenarios.paths._torch import build_model, clip_gradients, optimizer_of, outcome_of, refuse_parts
from scenarios.schedule import schedule_of
from tracer.errors import BadConfig


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train on the batches of `feed`."""
    import torch

    refuse_parts(config)
    if config.train.validate_every:
        raise BadConfig("train.validate_every: this loop does not validate", "use hf-trainer, trl-sft or mlx-lm")
    device = _device(config.train.device)
    model = build_model(config, feed).to(device)
    if config.train.checkpointing is True:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.train.autocast == "bfloat16")
    token_mean = config.loss.reduction == "token-mean"
    parameters = [p for p in model.parameters() if p.requires_grad]
    kind, options = optimizer_of(config.optimizer)
    optimizer = kind(parameters, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_of(config).factor)
    forward = torch.compile(model) if config.train.compile is True else model
    losses: list[Any] = []
    assert feed.steps is not None
    for micro_batches in feed.steps:
        tokens = sum(int(micro_batch.supervised.sum()) for micro_batch in micro_batches) if token_mean else None
        for micro_batch in micro_batches:
            with autocast:
                loss = _loss(forward, _tensors(micro_batch, device), tokens, config.loss.precision)
            loss.backward()
            losses.append(loss.detach())
        if not token_mean:
            _average(parameters, len(micro_batches))
        clip_gradients(parameters, config.clip)
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


def _loss(model: Any, batch: dict[str, Any], tokens: int | None, precision: str) -> Any:
    """Cross-entropy: the mean over the supervised positions, or their sum divided by `tokens`.

    transformers takes logits to float32 first; for `precision = "model"` they stay as they are.
    """
    import torch

    if precision != "model":
        return model(**batch, **({} if tokens is None else {"num_items_in_batch": torch.tensor(tokens)})).loss
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    if tokens is None:
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / tokens


def _average(parameters: list[Any], micro_batches: int) -> None:
    if micro_batches > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(micro_batches)
