"""What a path is fed: its micro-batches, and the adapters that it starts from if they are given.

Both may come from another run's trace (`--batches-from`, `--init-from`), which is what makes a pair on two frameworks
comparable: the same tokens and the same adapters, to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scenarios.config import DataConfig, RunConfig
from scenarios.data import MicroBatch, Rows, load_tokens, make_rows, make_texts, plain_batches, with_mask_label
from tracer.dtypes import to_numpy
from tracer.errors import BadConfig, BadUsage
from tracer.names import NameMap
from tracer.reader import RowView, Trace, open_trace
from tracer.schema import Phase

_ADAPTER: Final = ".lora_"
_names: Final = NameMap()


@dataclass(frozen=True, slots=True)
class Feed:
    """Input of a run beside its configuration.

    `rows` are the token rows in order; `steps` the micro-batches by step, None where the path's library makes them of
    the rows; `adapters` by canonical name and in canonical layout, float, None for the path's own draw; `texts` those
    of the rows, None where the rows are not texts one by one.
    """

    rows: Rows
    pad: int
    steps: tuple[tuple[MicroBatch, ...], ...] | None
    adapters: Mapping[str, npt.NDArray[Any]] | None = None
    texts: tuple[str, ...] | None = None

    def each(self) -> Iterator[MicroBatch]:
        """All micro-batches in order; only where `steps` is given."""
        assert self.steps is not None, "the path's library makes the batches"
        for step in self.steps:
            yield from step


def make_feed(
    config: RunConfig, *, init_from: Path | None = None, batches_from: Path | None = None, own_batching: bool = False
) -> Feed:
    """The feed of a run; `own_batching` says that the path's library has a loader of its own.

    Raises a TraceError: a trace that cannot be read, or one that does not fit the configuration.
    """
    tokens = load_tokens(config.model.name)
    rows = make_rows(config.data, tokens)
    adapters = read_adapters(init_from) if init_from is not None else None
    library = own_batching and config.data.batching == "library" and batches_from is None
    if config.train.data_seed != "seed" and not library:
        raise BadConfig("train.data_seed orders a library's own batches", 'use data.batching = "library"')
    if batches_from is not None:
        _refuse(
            config.data, ("pad_extra", "supervise"), "shapes batches that are made here", "leave --batches-from out"
        )
        steps = with_mask_label(read_batches(batches_from, config), config.data)
        return Feed(rows, tokens.pad, steps, adapters)
    if library:
        needs = "needs batches that are known beforehand"
        _refuse(config.data, ("mask_label", "pad_extra", "supervise"), needs, 'use data.batching = "plain"')
        return Feed(rows, tokens.pad, None, adapters, make_texts(config.data, tokens))
    return Feed(rows, tokens.pad, plain_batches(rows, config.data, config.train, tokens.pad), adapters)


def _refuse(data: DataConfig, names: tuple[str, ...], reason: str, instead: str) -> None:
    for name in names:
        if getattr(data, name) != getattr(DataConfig(), name):
            raise BadConfig(f"data.{name} {reason}", instead)


def read_adapters(path: Path) -> dict[str, npt.NDArray[Any]]:
    """LoRA factors of step 0 by canonical name, canonical layout; raises BadUsage if the trace has none."""
    with open_trace(path) as trace:
        row = trace.row(Phase.INIT, 0)
        entries = enumerate(row.layout.entries) if row is not None else ()
        found = {e.name: to_numpy(row.read(i), e.dtype) for i, e in entries if row and e.stored and _is_adapter(e.name)}
    if not found:
        raise BadUsage(f"{path} holds no adapters at step 0", "record a LoRA run with its init phase")
    return found


def _is_adapter(name: str) -> bool:
    return _ADAPTER in name and not name.endswith(".lora_scale")


def read_batches(path: Path, config: RunConfig) -> tuple[tuple[MicroBatch, ...], ...]:
    """The micro-batches of steps 1 to `train.steps` exactly as recorded; raises BadUsage if they do not fit."""
    with open_trace(path) as trace:
        return tuple(_read_step(trace, step, config, path) for step in range(1, config.train.steps + 1))


def _read_step(trace: Trace, step: int, config: RunConfig, path: Path) -> tuple[MicroBatch, ...]:
    numbers = trace.micro_batches(Phase.BATCH, step)
    if not numbers:
        last = max(trace.steps, default=0)
        raise BadUsage(f"{path} has no batches for step {step}", f"its last step is {last}; set train.steps to fit")
    if len(numbers) != config.train.accumulation:
        raise BadUsage(
            f"{path} has {len(numbers)} micro-batches in step {step}, train.accumulation is {config.train.accumulation}",
            f"set train.accumulation = {len(numbers)}",
        )
    rows = [trace.row(Phase.BATCH, step, number) for number in numbers]
    return tuple(_micro_batch(row, path) for row in rows if row is not None)


def _micro_batch(row: RowView, path: Path) -> MicroBatch:
    positions = row.layout.positions
    for needed in ("input_ids", "labels"):
        if needed not in positions:
            raise BadUsage(
                f"{path} holds no {needed} in its batches", "record a run whose batches the recorder can read"
            )

    def read(name: str) -> npt.NDArray[np.int64]:
        return row.read(positions[name]).astype(np.int64)

    mask = read("attention_mask") if "attention_mask" in positions else None
    return MicroBatch(read("input_ids"), read("labels"), mask)


def placed(
    adapters: Mapping[str, npt.NDArray[Any]], trainable: Iterable[tuple[str, tuple[int, ...]]]
) -> dict[str, npt.NDArray[Any]]:
    """Original name -> given adapter in the framework's own layout, for every trainable tensor that has one.

    Factors on one side only are named in one line on stderr each way; raises BadUsage where nothing fits or a shape
    differs.
    """
    result, used, own = {}, set(), []
    for original, shape in trainable:
        canonical = _names(original)
        data = adapters.get(canonical.name)
        if data is None:
            own.append(canonical.name)
            continue
        turned = data.T if canonical.transform else data
        if turned.shape != shape:
            raise BadUsage(
                f"the given {canonical.name} has shape {list(data.shape)}, this run needs {list(shape)} in its own layout",
                "use the same model and lora.rank for both runs",
            )
        result[original] = np.ascontiguousarray(turned)
        used.add(canonical.name)
    if not result:
        raise BadUsage("no given adapter fits this run", "use the same model and lora.targets for both runs")
    _tell("given adapters that this run does not have are left out", [n for n in adapters if n not in used])
    _tell("adapters that were not given keep this run's own draw", own)
    return result


def _tell(what: str, names: list[str]) -> None:
    if names:
        print(f"init-from: {len(names)} {what}: {names[0]}{' …' if len(names) > 1 else ''}", file=sys.stderr)
