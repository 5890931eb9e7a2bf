"""Rows of tokens, and the plain batches made of them, in the Hugging Face convention.

A micro-batch is `input_ids` [B, L], `labels` [B, L] (-100: not supervised; labels[:, t] is the token at t, predicted
from t-1, so column 0 is always -100) and `attention_mask` [B, L], right-padded to the longest row, all int64.
Nothing here draws from a global random generator, so making data never moves a run's seed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scenarios.config import DataConfig, TrainConfig
from scenarios.corpus import sentences
from scenarios.models import model_source
from tracer.errors import BadConfig, NotFound, PathUnavailable

IGNORED: Final = -100
Ints = npt.NDArray[np.int64]
Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass: [B, L] each, int64; no attention mask means that every position is attended."""

    input_ids: Ints
    labels: Ints
    attention_mask: Ints | None = None

    @property
    def supervised(self) -> npt.NDArray[np.bool_]:
        """Positions whose token is a target, [B, L]."""
        flags: npt.NDArray[np.bool_] = self.labels != IGNORED
        return flags


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the data needs of a tokenizer: text -> ids, and the ids that pad and end a row."""

    tokenizer: Any
    pad: int
    end: int | None

    def row(self, text: str) -> list[int]:
        """Ids of a text, with the end token."""
        ids = list(self.tokenizer.encode(text).ids)
        return ids if self.end is None or ids[-1:] == [self.end] else [*ids, self.end]


def load_tokens(model: str) -> Tokens:
    """Tokenizer of `model.name`; raises BadConfig if it has no tokenizer.json."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise PathUnavailable("the data need tokenizers", "install steptrace[torch] or steptrace[mlx]") from error
    source = model_source(model)
    settings = json.loads(_file(source, "config.json").read_text("utf-8"))
    end = settings.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    pad = settings.get("pad_token_id")
    return Tokens(Tokenizer.from_file(str(_file(source, "tokenizer.json"))), pad if pad is not None else end or 0, end)


def _file(source: str, name: str) -> Path:
    path = Path(source) / name
    if not Path(source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(source, name))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise BadConfig(f"{source}: {name} cannot be fetched from the hub: {error}") from error
    if not path.is_file():
        raise BadConfig(f"{source} has no {name}", "give a folder in the Hugging Face format")
    return path


def make_rows(data: DataConfig, tokens: Tokens) -> Rows:
    """The rows in the order in which they are taken, each 2 to `row_length` tokens; raises BadConfig or NotFound."""
    texts = sentences(data.rows, data.seed) if data.source == "synthetic" else _read_texts(Path(data.source), data.rows)
    rows = [tokens.row(text) for text in texts]
    cut = [row[: data.row_length] for row in rows] if data.variable else _equal_lengths(rows, data.row_length)
    usable = [tuple(row) for row in cut if len(row) > 1]  # one token has no target
    if not usable:
        raise BadConfig(f"data.source = {data.source} has no row of two tokens or more")
    if data.order == "shuffled":
        order = np.random.RandomState(data.order_seed).permutation(len(usable))
        usable = [usable[i] for i in order]
    return tuple(usable)


def _equal_lengths(rows: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """As many rows, each exactly `length` tokens: the texts one after another, from the start again at the end."""
    stream = [token for row in rows for token in row]
    repeated = stream * (-(-len(rows) * length // len(stream)))
    return [repeated[i * length : (i + 1) * length] for i in range(len(rows))]


def _read_texts(path: Path, limit: int) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
        return [json.loads(line)["text"] for line in lines if line.strip()][:limit]
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist", 'data.source is "synthetic" or a .jsonl file') from None
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise BadConfig(f'{path} is not a .jsonl file of {{"text": …}}: {error!r}') from error


def plain_batches(rows: Rows, data: DataConfig, train: TrainConfig, pad: int) -> tuple[tuple[MicroBatch, ...], ...]:
    """Micro-batches by step: rows in their order, `batch` at a time, from the first again after the last."""
    steps = []
    for step in range(train.steps):
        first = step * train.accumulation * train.batch
        starts = range(first, first + train.accumulation * train.batch, train.batch)
        steps.append(tuple(collate([rows[i % len(rows)] for i in range(s, s + train.batch)], pad) for s in starts))
    return with_mask_label(tuple(steps), data)


def collate(rows: Sequence[Sequence[int]], pad: int) -> MicroBatch:
    """Rows -> one micro-batch, right-padded to the longest; padding and column 0 are not supervised."""
    width = max(len(row) for row in rows)
    ids = np.full((len(rows), width), pad, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    labels = np.where(mask == 1, ids, IGNORED)
    labels[:, 0] = IGNORED
    return MicroBatch(ids, labels, mask)


def with_mask_label(steps: tuple[tuple[MicroBatch, ...], ...], data: DataConfig) -> tuple[tuple[MicroBatch, ...], ...]:
    """Take the label at `data.mask_label` of step `data.mask_step`'s first micro-batch out of the loss."""
    if not data.mask_label:
        return steps
    row, position = data.mask_label
    at = data.mask_step - 1
    if at >= len(steps):
        raise BadConfig(f"data.mask_step = {data.mask_step} is after the last step, {len(steps)}")
    first = steps[at][0]
    if row >= first.labels.shape[0] or position >= first.labels.shape[1] or not first.supervised[row, position]:
        raise BadConfig(
            f"data.mask_label = [{row}, {position}] is not a supervised position of step {data.mask_step}",
            f"its first micro-batch has shape {list(first.labels.shape)}; column 0 and padding are not supervised",
        )
    labels = first.labels.copy()
    labels[row, position] = IGNORED
    changed = (replace(first, labels=labels), *steps[at][1:])
    return (*steps[:at], changed, *steps[at + 1 :])
