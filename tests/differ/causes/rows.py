"""Write traces of chosen rows, and ask for the one cause of a pair, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from differ import Cause, DiffResult, diff
from tests.builders import F32, IGNORED, record
from tracer.dtypes import float32_to_bf16
from tracer.schema import WHOLE_STEP, Phase, Record, Row
from tracer.writer import TraceWriter

# (phase, step) or (phase, step, micro-batch) -> name -> values
Rows = Mapping[tuple[Any, ...], Mapping[str, Any]]

MODULES = tuple(f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "qkv")
A = tuple(f"{module}.lora_A.weight" for module in MODULES)
B = tuple(f"{module}.lora_B.weight" for module in MODULES)
W = tuple(f"{module}.weight" for module in MODULES)
OTHER = {"a": "b", "b": "a", None: None}


def frozen(values: np.ndarray, dtype: str = "float32") -> Record:
    """A frozen weight: its name is set by `write`, its values are not stored."""
    bits = float32_to_bf16(values) if dtype == "bfloat16" else values.astype(dtype)
    return replace(record("", bits, dtype=dtype), stored=False)


def write(
    path: Path, rows: Rows, *, declared: Mapping[str, Any] | None = None, observed: Mapping[str, Any] | None = None
) -> Path:
    """A trace of the rows given, and of an init row if there is none."""
    writer = TraceWriter(path, env={}, declared=dict(declared or {}), overwrite=True)
    full = {(Phase.INIT, 0): {"x": np.ones(4, F32)}, **rows}
    for step in sorted({key[1] for key in full}):
        here = [_row(key, records) for key, records in full.items() if key[1] == step]
        seen = {"framework": "numpy", **(observed or {})}
        writer.write_step(step, sorted(here, key=lambda row: (row.phase, row.micro_batch)), seen)
    writer.finish()
    return path


def _row(key: tuple[Any, ...], records: Mapping[str, Any]) -> Row:
    micro_batch = key[2] if len(key) > 2 else 0 if key[0].per_micro_batch else WHOLE_STEP
    made = (replace(v, name=n, original=n) if isinstance(v, Record) else record(n, v) for n, v in records.items())
    return Row(key[0], key[1], micro_batch, tuple(made))


def compare(folder: Path, a: Rows, b: Rows) -> DiffResult:
    """Diff of two traces of the rows given."""
    return diff(write(folder / "a.h5", a), write(folder / "b.h5", b))


def shown(result: DiffResult) -> list[str]:
    """Ids of the causes of a result, without settings."""
    return [cause.id for cause in result.causes if cause.id != "config.differs"]


def only_cause(folder: Path, a: Rows, b: Rows, expected: str) -> tuple[Cause, Cause]:
    """The one cause of a pair and that of the mirrored pair, after checking what must hold of any cause."""
    there, back = compare(folder, a, b), compare(folder, b, a)
    assert shown(there) == [expected], (shown(there), there.findings)
    assert shown(back) == [expected], (shown(back), back.findings)
    cause, mirrored = there.causes[0], back.causes[0]
    assert there.first is not None
    assert (cause.step, cause.phase) == (there.first.step, there.first.phase)
    assert (mirrored.step, mirrored.phase, mirrored.names) == (cause.step, cause.phase, cause.names)
    assert mirrored.side == OTHER[cause.side]
    assert cause.explains is None or cause.explains >= 0.99
    assert mirrored.explains is None or mirrored.explains >= 0.99
    assert cause.summary
    there.to_json()
    return cause, mirrored


def lora(seed: int = 0, rank: int = 8, width: int = 64) -> dict[str, np.ndarray]:
    """Initial factors of six modules: A drawn uniformly, B zero."""
    rng = np.random.default_rng(seed)
    values = {name: rng.uniform(-1, 1, (rank, width)).astype(F32) / F32(np.sqrt(width)) for name in A}
    return values | {name: np.zeros((width, rank), F32) for name in B}


def init(values: Mapping[str, Any]) -> Rows:
    return {(Phase.INIT, 0): values}


def gradients(seed: int = 3, rows: int = 16, columns: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(rows, columns)).astype(F32) for name in B}


def sentences(seed: int = 5, rows: int = 4, length: int = 12, width: int = 12, pad: int = 0) -> dict[str, np.ndarray]:
    """ids, labels and number of tokens of one micro-batch: BOS (1), distinct ids, then padding; the prompt is unsupervised."""
    rng = np.random.default_rng(seed)
    ids = np.full((rows, width), pad, np.int64)
    labels = np.full((rows, width), IGNORED, np.int64)
    for i in range(rows):
        here = length - i % 3
        ids[i, :here] = [1, *rng.permutation(np.arange(10, 90))[: here - 1]]
        labels[i, 3:here] = ids[i, 3:here]
    return {"input_ids": ids, "labels": labels, "tokens": np.int64((labels != IGNORED).sum())}


def counted(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same batch, its tokens counted again."""
    return {**batch, "tokens": np.int64((batch["labels"] != IGNORED).sum())}
