"""Path `hf-trainer`: transformers' Trainer over a PEFT model.

Notable: Trainer seeds once more when it is built, after the adapter has been drawn; it weights accumulated gradients by
tokens; it clips by norm itself.  Clipping by value is not one of its arguments and is done where its callbacks offer the
gradients.  With `data.batching = "library"` Trainer samples and collates by itself.
"""

from __future__ import annotations

import tempfile
from typing import Any

from scenarios.config import RunConfig
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from scenarios.paths._torch import build_model, optimizer_of, outcome_of


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train on the batches of `feed`, or on its rows with Trainer's own loader."""
    from transformers import PrinterCallback

    model = build_model(config, feed)
    with tempfile.TemporaryDirectory(prefix="hf-trainer-") as folder:
        losses: list[Any] = []
        trainer = _trainer_class()(
            model=model,
            args=_arguments(config, folder),
            train_dataset=_Rows(feed),
            data_collator=_collator(config),
            callbacks=_callbacks(config),
            **_optimizer(config),
        )
        trainer.remove_callback(PrinterCallback)  # prints its logs to stdout
        trainer.step_losses, trainer.fixed_batches = losses, feed if feed.steps is not None else None
        trainer.train()
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        return outcome_of(model, optimizer, losses)


def _arguments(config: RunConfig, folder: str) -> Any:
    from transformers import TrainingArguments

    optimizer, train = config.optimizer, config.train
    kind = "constant_with_warmup" if optimizer.schedule == "constant" and optimizer.warmup else optimizer.schedule
    return TrainingArguments(
        output_dir=folder,
        max_steps=train.steps,
        per_device_train_batch_size=train.batch,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=optimizer.lr,
        lr_scheduler_type=kind,
        warmup_steps=optimizer.warmup,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        max_grad_norm=config.clip.value if config.clip.mode == "norm" else 0.0,
        seed=train.seed,
        torch_compile=train.compile is True,
        use_cpu=train.device == "cpu",
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _optimizer(config: RunConfig) -> dict[str, Any]:
    """Trainer's own AdamW unless another optimizer is asked for."""
    if config.optimizer.name == "adamw" and config.optimizer.bias_correction:
        return {}
    return {"optimizer_cls_and_kwargs": optimizer_of(config.optimizer)}


class _Rows:
    """Token rows as Trainer's data set."""

    def __init__(self, feed: Feed) -> None:
        self.rows = feed.rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": list(self.rows[index])}


def _collator(config: RunConfig) -> Any:
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    from scenarios.models import model_source

    tokenizer = AutoTokenizer.from_pretrained(model_source(config.model.name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForLanguageModeling(tokenizer, mlm=False)


def _callbacks(config: RunConfig) -> list[Any]:
    import torch
    from transformers import TrainerCallback

    class ClipByValue(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            torch.nn.utils.clip_grad_value_([p for p in model.parameters() if p.requires_grad], config.clip.value)

    return [ClipByValue()] if config.clip.mode == "value" else []


def _trainer_class() -> Any:
    import torch
    from transformers import Trainer

    class FedTrainer(Trainer):  # type: ignore[misc]
        """Trainer that keeps each micro-batch's loss, and can be handed its micro-batches."""

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

    return FedTrainer


def _tensors(micro_batch: Any) -> dict[str, Any]:
    import torch

    arrays = {"input_ids": micro_batch.input_ids, "labels": micro_batch.labels}
    if micro_batch.attention_mask is not None:
        arrays["attention_mask"] = micro_batch.attention_mask
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
