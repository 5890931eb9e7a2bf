"""What the paths over transformers' Trainer share: arguments, rows, callbacks, and a trainer that can be fed.

Nothing here knows of a recorder.  A setting of `"library"` is left out of the arguments, so that the library's own default
holds.
"""

from __future__ import annotations

from typing import Any

from scenarios.config import RunConfig
from scenarios.feed import Feed
from scenarios.paths._torch import clip_gradients, optimizer_of
from tracer.errors import BadConfig


def arguments(config: RunConfig, folder: str) -> dict[str, Any]:
    """Arguments of TrainingArguments, or of a subclass of it."""
    optimizer, train = config.optimizer, config.train
    kind = "constant_with_warmup" if optimizer.schedule == "constant" and optimizer.warmup else optimizer.schedule
    given: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": train.steps,
        "per_device_train_batch_size": train.batch,
        "gradient_accumulation_steps": train.accumulation,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": kind,
        "warmup_steps": optimizer.warmup,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "seed": train.seed,
        "torch_compile": train.compile is True,
        "use_cpu": train.device == "cpu" or _only_cpu(train.autocast),
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return given | _chosen(config)


def _only_cpu(autocast: str) -> bool:
    """Whether autocast has to be told that there is no accelerator: bfloat16 is refused without one otherwise."""
    import torch

    return autocast != "none" and not torch.accelerator.is_available()


def _checkpointing() -> str:
    """The argument for gradient checkpointing, which transformers 5 has renamed."""
    from transformers import TrainingArguments

    new = "activation_checkpointing"
    return new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


def _chosen(config: RunConfig) -> dict[str, Any]:
    """Arguments that are given only where the configuration says something of them."""
    train, clip = config.train, config.clip
    given: dict[str, Any] = {}
    if clip.mode != "library":
        given["max_grad_norm"] = clip.value if clip.mode == "norm" else 0.0
    if train.checkpointing != "library":
        given[_checkpointing()] = train.checkpointing
    if train.autocast != "library":
        given["bf16"] = train.autocast == "bfloat16"
    if isinstance(train.data_seed, int):
        given["data_seed"] = train.data_seed
    if train.validate_every:
        given |= {
            "eval_strategy": "steps",
            "eval_steps": train.validate_every,
            "per_device_eval_batch_size": train.batch,
        }
    return given


def optimizer_arguments(config: RunConfig) -> dict[str, Any]:
    """Trainer's own AdamW unless another optimizer is asked for."""
    if config.optimizer.name == "adamw" and config.optimizer.bias_correction:
        return {}
    return {"optimizer_cls_and_kwargs": optimizer_of(config.optimizer)}


def callbacks(config: RunConfig) -> list[Any]:
    """Clipping that is none of Trainer's arguments, done where its callbacks offer the gradients."""
    from transformers import TrainerCallback

    class Clip(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            clip_gradients([p for p in model.parameters() if p.requires_grad], config.clip)

    return [Clip()] if config.clip.mode in ("value", "tensor") else []


def set_reduction(trainer: Any, config: RunConfig) -> None:
    """Trainer weights by tokens unless its model is said not to take the number of them; raises BadConfig."""
    if config.loss.precision == "model":
        raise BadConfig("loss.precision: Trainer's loss is taken of float32 logits", "use the path torch")
    if config.loss.reduction == "mean-of-means":
        trainer.model_accepts_loss_kwargs = False


def validation_rows(config: RunConfig, rows: Any) -> Any:
    """The rows that are validated on, None without validation."""
    train = config.train
    return rows(min(train.validation_batches * train.batch, config.data.rows)) if train.validate_every else None


def feedable(kind: type[Any]) -> type[Any]:
    """A Trainer class that keeps each micro-batch's loss, and can be handed its micro-batches."""
    import torch

    class FedTrainer(kind):  # type: ignore[misc]
        step_losses: list[Any]
        fixed_batches: Feed | None

        def get_train_dataloader(self) -> Any:
            if self.fixed_batches is None:
                return super().get_train_dataloader()
            batches = [_tensors(micro_batch) for micro_batch in self.fixed_batches.each()]
            return torch.utils.data.DataLoader(batches, batch_size=None, shuffle=False)

        def training_step(self, *arguments: Any, **options: Any) -> Any:
            loss = super().training_step(*arguments, **options)
            self.step_losses.append(loss.detach())
            return loss

    FedTrainer.__name__ = FedTrainer.__qualname__ = f"Fed{kind.__name__}"
    return FedTrainer


def _tensors(micro_batch: Any) -> dict[str, Any]:
    import torch

    arrays = {"input_ids": micro_batch.input_ids, "labels": micro_batch.labels}
    if micro_batch.attention_mask is not None:
        arrays["attention_mask"] = micro_batch.attention_mask
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def train(trainer: Any, feed: Feed) -> tuple[Any, list[Any]]:
    """Train; the optimizer without accelerate's wrapper, and the loss of each micro-batch."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # prints its logs to stdout
    trainer.step_losses, trainer.fixed_batches = [], feed if feed.steps is not None else None
    trainer.train()
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer), trainer.step_losses


def padding_tokenizer(source: str) -> Any:
    """The model's tokenizer, with the end token as padding where it has none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
