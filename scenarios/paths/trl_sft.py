"""Path `trl-sft`: TRL's SFTTrainer, which adapts the model with PEFT itself.

Notable: SFTTrainer seeds before it adapts the model, so `train.seed` decides the draw wherever `train.seed_at` is, and
the loss is computed outside the model, of per-token log-probabilities.  Its own defaults, bfloat16 autocast and
gradient checkpointing, hold where a setting is `"library"`.  Adapters that are given are set once it has drawn its own.
"""

from __future__ import annotations

import tempfile
from typing import Any

from scenarios.config import RunConfig
from scenarios.data import Rows
from scenarios.feed import Feed
from scenarios.models import model_source
from scenarios.outcome import Outcome
from scenarios.paths import _trainer
from scenarios.paths._torch import adapter_settings, load_base, outcome_of, refuse_parts, set_adapters
from tracer.errors import BadConfig


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train on the batches of `feed`, or on its rows with SFTTrainer's own preparation and loader."""
    from trl import SFTConfig, SFTTrainer

    refuse_parts(config)
    if config.loss.reduction == "mean-of-means" and config.train.accumulation > 1:
        raise BadConfig("loss.reduction: SFTTrainer weights every token of a step equally", "use hf-trainer or torch")
    base = load_base(config)
    with tempfile.TemporaryDirectory(prefix="trl-sft-") as folder:
        trainer = _trainer.feedable(SFTTrainer)(
            model=base,
            args=SFTConfig(**_arguments(config, folder)),
            train_dataset=_dataset(feed.rows),
            eval_dataset=_trainer.validation_rows(config, lambda count: _dataset(feed.rows[:count])),
            processing_class=_trainer.padding_tokenizer(model_source(config.model.name)),
            peft_config=adapter_settings(base, config),
            callbacks=_trainer.callbacks(config),
            **_trainer.optimizer_arguments(config),
        )
        _trainer.set_reduction(trainer, config)
        if feed.adapters is not None:
            set_adapters(trainer.model, feed)
        optimizer, losses = _trainer.train(trainer, feed)
        return outcome_of(trainer.model, optimizer, losses)


def _arguments(config: RunConfig, folder: str) -> dict[str, Any]:
    # Rows are cut already, and a row longer than TRL's own limit is not to be cut again.
    return _trainer.arguments(config, folder) | {"max_length": None}


def _dataset(rows: Rows) -> Any:
    """Token rows as a data set; TRL takes rows with `input_ids` as they are."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    return Dataset.from_dict({"input_ids": [list(row) for row in rows]})
