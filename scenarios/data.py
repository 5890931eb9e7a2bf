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
    """What the data needs of a tokenizer: text -> ids, and the ids that pad, end and begin a row."""

    tokenizer: Any
    pad: int
    end: int | None
    begin: int | None = None

    def row(self, text: str, *, begin: int | str = "tokenizer", end: int | str = 1) -> list[int]:
        """Ids of a text; `begin`, `end`: how often those tokens stand there, "tokenizer" as the tokenizer puts them.

        Raises BadConfig where the model has no such token.
        """
        ids = list(self.tokenizer.encode(text).ids)
        ids = _repeated(ids, self.begin, begin, "data.bos")
        return _repeated(ids[::-1], self.end, end, "data.eos")[::-1]


def _repeated(ids: list[int], token: int | None, times: int | str, setting: str) -> list[int]:
    """`ids` with exactly `times` of a token at their start."""
    if isinstance(times, str) or (token is None and (times == 0 or (setting == "data.eos" and times == 1))):
        return ids
    if token is None:
        raise BadConfig(f"{setting} = {times}: the model has no such token", f'use {setting} = "tokenizer"')
    first = next((i for i, found in enumerate(ids) if found != token), len(ids))
    return [token] * times + ids[first:]


def load_tokens(model: str) -> Tokens:
    """Tokenizer of `model.name`; raises BadConfig if it has no tokenizer.json."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise PathUnavailable("the data need tokenizers", "install steptrace[torch] or steptrace[mlx]") from error
    source = model_source(model)
    settings = json.loads(_file(source, "config.json").read_text("utf-8"))
    end, begin = (_first(settings.get(f"{kind}_token_id")) for kind in ("eos", "bos"))
    pad = settings.get("pad_token_id")
    tokenizer = Tokenizer.from_file(str(_file(source, "tokenizer.json")))
    return Tokens(tokenizer, pad if pad is not None else end or 0, end, begin)


def _first(ids: Any) -> int | None:
    """One id of one or several."""
    first: int | None = ids[0] if isinstance(ids, list) else ids
    return first


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
    rows = [tokens.row(text, begin=data.bos, end=data.eos) for text in _texts(data)]
    cut = [row[: data.row_length] for row in rows] if data.variable else _equal_lengths(rows, data.row_length)
    usable = [tuple(row) for row in cut if len(row) > 1]  # one token has no target
    if not usable:
        raise BadConfig(f"data.source = {data.source} has no row of two tokens or more")
    return tuple(usable[i] for i in _order(data, [len(row) for row in usable]))


def make_texts(data: DataConfig, tokens: Tokens) -> tuple[str, ...] | None:
    """The text of each of `make_rows`, for a library that makes tokens by itself: one end token, rows cut at their length.

    None where the rows are not texts one by one, or begin or end otherwise.
    """
    if not data.variable or data.bos != "tokenizer" or data.eos != 1:
        return None
    pairs = [(text, len(tokens.row(text)[: data.row_length])) for text in _texts(data)]
    usable = [(text, length) for text, length in pairs if length > 1]
    return tuple(usable[i][0] for i in _order(data, [length for _, length in usable]))


def _texts(data: DataConfig) -> list[str]:
    if data.source == "synthetic":
        return sentences(data.rows, data.seed)
    return _read_texts(Path(data.source), data.rows)


def _order(data: DataConfig, lengths: Sequence[int]) -> list[int]:
    """Indices of the rows in the order in which they are taken."""
    if data.order == "shuffled":
        return [int(i) for i in np.random.RandomState(data.order_seed).permutation(len(lengths))]
    in_file = list(range(len(lengths)))
    return sorted(in_file, key=lengths.__getitem__) if data.order == "length" else in_file


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
        taken = ([rows[i % len(rows)] for i in range(start, start + train.batch)] for start in starts)
        steps.append(tuple(collate(group, pad, extra=data.pad_extra, supervise=data.supervise) for group in taken))
    return with_mask_label(tuple(steps), data)


def collate(rows: Sequence[Sequence[int]], pad: int, *, extra: int = 0, supervise: str = "tokens") -> MicroBatch:
    """Rows -> one micro-batch, right-padded to the longest and `extra` columns more.

    Padding and column 0 are not supervised; `supervise` as in DataConfig.
    """
    width = max(len(row) for row in rows) + extra
    ids = np.full((len(rows), width), pad, np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    targets = mask.copy()
    for i, row in enumerate(rows):
        if supervise == "all-but-last":
            targets[i, len(row) - 1] = 0
        elif supervise == "tokens-and-pad":
            targets[i, len(row) : len(row) + 1] = 1
    labels = np.where(targets == 1, ids, IGNORED)
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
