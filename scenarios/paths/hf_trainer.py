"""Path `hf-trainer`: transformers' Trainer over a PEFT model.

Notable: Trainer seeds once more when it is built, after the adapter has been drawn; it weights accumulated gradients by
tokens; it clips by norm itself.  Clipping by value is not one of its arguments and is done where its callbacks offer the
gradients.  With `data.batching = "library"` Trainer samples and collates by itself.
"""

from __future__ import annotations

import tempfile

from scenarios.config import RunConfig
from scenarios.data import Rows
from scenarios.feed import Feed
from scenarios.models import model_source
from scenarios.outcome import Outcome
from scenarios.paths import _trainer
from scenarios.paths._torch import build_model, outcome_of, refuse_parts


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Train on the batches of `feed`, or on its rows with Trainer's own loader."""
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    refuse_parts(config)
    model = build_model(config, feed)
    with tempfile.TemporaryDirectory(prefix="hf-trainer-") as folder:
        trainer = _trainer.feedable(Trainer)(
            model=model,
            args=TrainingArguments(**_trainer.arguments(config, folder)),
            train_dataset=_Rows(feed.rows),
            eval_dataset=_trainer.validation_rows(config, lambda count: _Rows(feed.rows[:count])),
            data_collator=DataCollatorForLanguageModeling(
                _trainer.padding_tokenizer(model_source(config.model.name)), mlm=False
            ),
            callbacks=_trainer.callbacks(config),
            **_trainer.optimizer_arguments(config),
        )
        _trainer.set_reduction(trainer, config)
        optimizer, losses = _trainer.train(trainer, feed)
        return outcome_of(model, optimizer, losses)


class _Rows:
    """Token rows as Trainer's data set."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": list(self.rows[index])}
