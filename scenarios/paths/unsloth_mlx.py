"""Path `unsloth-mlx`: FastMLXModel, get_peft_model and MLXTrainer of unsloth_zoo, which the user installs.

Notable: its loader seeds right before it builds the adapters; MLXTrainer weights micro-batches by tokens, corrects Adam's
bias, applies the decay by itself and, told nothing, caps the norm of each tensor's gradient at 1.  Given batches are handed
to it ready made; with `data.batching = "library"` it makes its own of the texts.  unsloth_zoo expects a GPU outside of
macOS unless UNSLOTH_ZOO_DISABLE_GPU_INIT says otherwise, so that variable is set for this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from scenarios.config import ClipConfig, RunConfig
from scenarios.feed import Feed
from scenarios.models import model_source
from scenarios.outcome import Outcome
from scenarios.paths._mlx import outcome_of, seed, set_adapters
from scenarios.paths._mlx_loss import Loss, half_open
from scenarios.paths._mlx_parts import run_parts
from tracer.errors import BadConfig

_LINUX_SWITCH = "UNSLOTH_ZOO_DISABLE_GPU_INIT"


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train with MLXTrainer."""
    return run_parts(config, feed, "unsloth-mlx")


def allow_without_gpu() -> None:
    """Before the first import of unsloth_zoo on a machine that is not a Mac."""
    if sys.platform != "darwin":
        os.environ.setdefault(_LINUX_SWITCH, "1")


def load(config: RunConfig, feed: Feed) -> tuple[Any, Any]:
    """Base model with LoRA layers, and its tokenizer; raises BadConfig for what the loader does not offer."""
    from unsloth_zoo.mlx.loader import FastMLXModel

    train, lora = config.train, config.lora
    if train.seed_at != "after-load":
        raise BadConfig("train.seed_at: unsloth seeds right before it builds the adapters", 'use "after-load"')
    seed(train.seed)
    source = model_source(config.model.name)
    model, tokenizer = FastMLXModel.from_pretrained(
        source, dtype=_dtype(config.model.dtype, source), load_in_4bit=False, text_only=True, random_state=train.seed
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=lora.rank,
        target_modules="all-linear" if lora.targets == "linear" else list(lora.targets),
        lora_alpha=lora.effective_scale * lora.rank,
        lora_dropout=lora.dropout,
        random_state=train.seed,
        finetune_last_n_layers=None if lora.layers == "all" else int(lora.layers),
        **({} if train.checkpointing == "library" else {"use_gradient_checkpointing": train.checkpointing}),
    )
    if feed.adapters is not None:
        set_adapters(model, feed)
    return model, tokenizer


def _dtype(name: str, source: str) -> str | None:
    """What the loader is told; left alone it casts to bfloat16 (float16 on an M1 or M2)."""
    if name == "library":
        return None
    if name != "checkpoint":
        return name
    settings = json.loads(Path(source, "config.json").read_text("utf-8"))
    return str(settings.get("dtype") or settings.get("torch_dtype") or "float32")


def train(config: RunConfig, feed: Feed, model: Any, tokenizer: Any, loss: Loss | None) -> Outcome:
    """The run of MLXTrainer; `loss` another path's, None for its own."""
    from unsloth_zoo.mlx import trainer as library

    _refuse(config)
    seen, given = _Seen(), feed.steps is not None
    rows = _rows(feed) if not given else _given_rows(feed) if loss is None else None
    with tempfile.TemporaryDirectory(prefix="unsloth-mlx-") as folder, _with_loss(library, loss):
        trainer = library.MLXTrainer(
            model=model,
            tokenizer=tokenizer,
            train_dataset=rows or _rows(feed),
            args=library.MLXTrainingConfig(
                **_arguments(config, folder, plain=loss is not None), preserve_dataset_order=given
            ),
            callbacks=[seen],
        )
        trainer.add_step_callback(seen.logged)
        if given and rows is None:
            trainer._batches = list(_given(feed, loss))
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    return outcome_of(model, seen.optimizer, seen.losses)


class _Seen:
    """What the trainer's callbacks hand over: the optimizer, and the loss of every step."""

    def __init__(self) -> None:
        self.optimizer: Any = None
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.optimizer = optimizer

    def on_step_end(self, *_: Any, optimizer: Any, **__: Any) -> None:
        self.optimizer = optimizer

    def logged(self, *values: Any) -> None:
        """The third of a step's values is its loss; how many there are depends on the version."""
        self.losses.append(float(values[2]))


def _refuse(config: RunConfig) -> None:
    if config.loss.reduction == "mean-of-means" and config.train.accumulation > 1:
        raise BadConfig("loss.reduction: MLXTrainer weights every token of a step equally", "use the path mlx-lm")
    if not config.optimizer.bias_correction:
        raise BadConfig("optimizer.bias_correction: MLXTrainer always corrects", "use the path mlx")
    if config.train.validate_every:
        raise BadConfig("train.validate_every is not offered on this path", "use mlx-lm, hf-trainer or trl-sft")


def _arguments(config: RunConfig, folder: str, *, plain: bool) -> dict[str, Any]:
    """Arguments of MLXTrainingConfig; `plain`: without the fused loss."""
    optimizer, train = config.optimizer, config.train
    kind = "constant_with_warmup" if optimizer.schedule == "constant" and optimizer.warmup else optimizer.schedule
    given: dict[str, Any] = {
        "per_device_train_batch_size": train.batch,
        "gradient_accumulation_steps": train.accumulation,
        "max_steps": train.steps,
        "warmup_steps": optimizer.warmup,
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": kind,
        "optim": optimizer.name,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "seed": train.data_seed if isinstance(train.data_seed, int) else train.seed,
        "max_seq_length": config.data.row_length,
        "use_cce": not plain and config.loss.precision != "model",
        "compile": train.compile is not False,
        "logging_steps": 1,
        "output_dir": folder,
    }
    if train.checkpointing != "library":
        given["gradient_checkpointing"] = train.checkpointing
    return given | _clip(config.clip)


def _clip(clip: ClipConfig) -> dict[str, Any]:
    """Told nothing, MLXTrainer clips each tensor's norm; a 0 for it is no clipping."""
    if clip.mode == "library":
        return {}
    names = {"norm": "max_grad_norm", "value": "max_grad_value", "tensor": "max_grad_leaf_norm"}
    return {names[clip.mode]: clip.value} if clip.mode in names else {"max_grad_leaf_norm": 0.0}


def _rows(feed: Feed) -> list[dict[str, Any]]:
    if feed.texts is not None:
        return [{"text": text} for text in feed.texts]
    return [{"input_ids": list(row)} for row in feed.rows]


def _given_rows(feed: Feed) -> list[dict[str, list[int]]] | None:
    """Rows of the given batches, without padding; taken in order they make those batches again.

    None where they would not: a batch that is wider than its longest row, or without a mask that says what padding is.
    """
    rows = []
    for micro_batch in feed.each():
        mask = micro_batch.attention_mask
        if mask is None or not mask.any(axis=0).all() or (np.diff(mask, axis=1) > 0).any():
            return None
        for ids, labels, length in zip(micro_batch.input_ids, micro_batch.labels, mask.sum(axis=1), strict=True):
            rows.append({"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()})
    return rows


def _given(feed: Feed, loss: Loss | None) -> Iterator[tuple[Any, ...]]:
    import mlx.core as mx

    arrays = half_open if loss is None else loss.arrays
    for micro_batch in feed.each():
        yield tuple(mx.array(array) for array in arrays(micro_batch))


@contextlib.contextmanager
def _with_loss(library: Any, loss: Loss | None) -> Iterator[None]:
    """Let the trainer build another path's loss: it has no argument for one."""
    if loss is None:
        yield
        return
    with mock.patch.object(library, "make_baseline_loss_fn", return_value=loss.function):
        yield
