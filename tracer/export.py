"""Take numbers out of a trace: curves for TensorBoard, the tensors of a step for numpy or safetensors.

Curves come from settings and statistics, so they need no tensor:

    loss                  mean over the micro-batches of a step
    norm/grad             sqrt of the sum of l2^2 over the records of `grad`; likewise clipped_grad, param
    hparams/<name>        each setting of the optimizer, eval/<name> each logged number

TensorBoard's files are written by `tensorboardX` or `tensorboard`, whichever is installed.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.dtypes import to_float64, to_numpy
from tracer.errors import BadUsage, NoPermission, NotFound, PackageMissing
from tracer.reader import RowView, Trace
from tracer.schema import REPORTED_PREFIX, WHOLE_STEP, Phase, State

_L2: Final = 0
# Writers of TensorBoard's files, in the order in which they are looked for.
_WRITERS: Final = (("tensorboardX", "SummaryWriter"), ("tensorboard.summary", "Writer"))
_NORMS: Final = (Phase.GRAD, Phase.CLIPPED_GRAD, Phase.PARAM)


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a curve."""

    tag: str
    step: int
    value: float


def scalars(trace: Trace) -> Iterator[Point]:
    """All curves of a trace, by step; a fingerprint has them too."""
    for step in trace.steps:
        losses = [value for row in _rows(trace, Phase.LOSS, step) for name, value in _numbers(row) if name == "loss"]
        if losses:
            yield Point("loss", step, sum(losses) / len(losses))
        for phase in _NORMS:
            for row in _rows(trace, phase, step):
                yield Point(f"norm/{phase.label}", step, _norm(row))
        for phase in (Phase.HPARAMS, Phase.EVAL):
            for row in _rows(trace, phase, step):
                yield from (Point(f"{phase.label}/{name}", step, value) for name, value in _numbers(row))


def _rows(trace: Trace, phase: Phase, step: int) -> list[RowView]:
    return [row for m in trace.micro_batches(phase, step) if (row := trace.row(phase, step, m)) is not None]


def _numbers(row: RowView) -> Iterator[tuple[str, float]]:
    """The one-element records of a row."""
    for i, entry in enumerate(row.layout.entries):
        if math.prod(entry.shape) == 1 and row.stored(i) and row.state(i) in (State.VALUE, State.ZERO):
            yield entry.name, float(to_float64(row.read(i), entry.dtype).reshape(-1)[0])


def _norm(row: RowView) -> float:
    kept = [i for i, entry in enumerate(row.layout.entries) if not entry.name.startswith(REPORTED_PREFIX)]
    return math.sqrt(float((row.stats[kept, _L2] ** 2).sum()))


def to_tensorboard(trace: Trace, folder: Path) -> int:
    """Write all curves into a log folder; returns how many points.  Raises PackageMissing, NoPermission, NotFound."""
    try:
        add, close = _writer(folder)
        count = 0
        for point in scalars(trace):
            add(point.tag, point.value, point.step)
            count += 1
        close()
    except PermissionError as error:
        raise NoPermission(f"{folder} may not be written", "choose a folder of yours") from error
    except OSError as error:
        raise NotFound(f"{folder} cannot be written: {error.strerror or error}", "check the name") from error
    return count


def _writer(folder: Path) -> tuple[Callable[[str, float, int], Any], Callable[[], Any]]:
    """`add(tag, value, step)` and `close()` of whichever writer is installed."""
    for module, name in _WRITERS:
        try:
            writer = getattr(importlib.import_module(module), name)(str(folder))
        except ImportError:
            continue
        return writer.add_scalar, writer.close
    raise PackageMissing(
        "neither tensorboardX nor tensorboard is installed", "pip install tensorboardX, or export a step as .npz"
    )


def to_file(trace: Trace, path: Path, *, phase: Phase, step: int, micro_batch: int | None = None) -> int:
    """Write the tensors of one row as .npz or .safetensors, canonical names and layout; returns how many.

    bfloat16 stays bfloat16 in safetensors and becomes float32 in .npz, exactly.  Raises BadUsage for a step, phase or ending
    that there is not, and for a fingerprint.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise BadUsage(f"{path.name} is neither .npz nor .safetensors", "the ending chooses the format")
    row = _row(trace, phase, step, micro_batch)
    held = [i for i in range(row.layout.records) if row.stored(i) and row.state(i) in (State.VALUE, State.ZERO)]
    if not held:
        hint = (
            "it is a fingerprint, which holds sketches"
            if trace.fingerprint
            else "only digests and statistics are recorded"
        )
        raise BadUsage(f"{trace.path} holds no tensor of {row.address()}", hint)
    try:
        if path.suffix == ".npz":
            _write_npz(row, held, path)
        else:
            _write_safetensors(row, held, path, {"trace": trace.tool, "step": str(step), "phase": phase.label})
    except PermissionError as error:
        raise NoPermission(f"{path} may not be written", "choose a folder of yours") from error
    except OSError as error:
        raise NotFound(f"{path} cannot be written: {error.strerror or error}", "check the name") from error
    return len(held)


def _row(trace: Trace, phase: Phase, step: int, micro_batch: int | None) -> RowView:
    numbers = trace.micro_batches(phase, step)
    if not numbers:
        has = ", ".join(sorted({row.phase.label for row in trace.rows() if row.step == step})) or "no such step"
        raise BadUsage(f"{trace.path} has no {phase.label} at step {step}", f"it has {has}")
    if micro_batch is None and numbers != (WHOLE_STEP,) and len(numbers) > 1:
        raise BadUsage(
            f"step {step} has {len(numbers)} micro-batches of {phase.label}", "choose one with --micro-batch"
        )
    row = trace.row(phase, step, numbers[0] if micro_batch is None else micro_batch)
    if row is None:
        raise BadUsage(f"step {step} has no micro-batch {micro_batch} of {phase.label}", f"it has {numbers}")
    return row


def _write_npz(row: RowView, held: list[int], path: Path) -> None:
    """A .npz whose members are written one at a time, so that memory is bounded by the largest record."""
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for i in held:
            entry = row.layout.entries[i]
            with archive.open(f"{entry.name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, to_numpy(row.read(i), entry.dtype), allow_pickle=False)


# dtype of the run -> the name that a safetensors header has for it.
_SAFETENSORS: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def _write_safetensors(row: RowView, held: list[int], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file: the length of the header (8 bytes), the header as JSON, the tensors' bytes one after the other."""
    from tracer.dtypes import DTYPES

    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for i in held:
        entry = row.layout.entries[i]
        size = math.prod(entry.shape) * DTYPES[entry.dtype].itemsize
        kind = _SAFETENSORS[entry.dtype]
        header[entry.name] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i in held:
            values: npt.NDArray[Any] = row.read(i)
            file.write(np.ascontiguousarray(values).tobytes())
