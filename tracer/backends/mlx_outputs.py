"""From captured arrays to the rows of `forward` and the losses of the tokens: the sampled positions of one micro-batch.

The positions follow from the batch (tracer/positions.py), which has values only now.  Only the sampled rows are taken, in MLX and
lazily: a whole layer's output or the logits never become numpy arrays.  Invariant: an array that has no value, or does
not have the shape of the batch, is left out or is `unrecorded`, and is never taken at wrong positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from tracer.backends.mlx_arrays import Array, array_record, dtype_name, plain_record, unrecorded
from tracer.backends.mlx_batch import IGNORED, Named
from tracer.backends.mlx_forward import LOGITS, TARGETS, TOKENS, Output
from tracer.names import BASE_LAYER, LORA_DELTA
from tracer.positions import relevant_positions
from tracer.recorder import Recorder
from tracer.schema import POSITIONS, TOKEN_LOSS, Record

Ints = npt.NDArray[np.int64]
# A label that is supervised, where it is not known which ones are.
_ANY: Final = 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """Module outputs [n, features] at positions int64[n, 2] of one micro-batch, in call order."""

    positions: Ints
    modules: tuple[Output, ...]

    @property
    def arrays(self) -> list[Array]:
        """All arrays, to be evaluated."""
        return [output.array for output in self.modules]


def sample(recorder: Recorder, batch: Sequence[Named], outputs: Sequence[Output]) -> Sampled | None:
    """Rows of the outputs at the positions of the batch; None if there is nothing to take rows of.

    The first output says how long the sequences are; what has another length or number of rows is no output per token.
    """
    if not outputs:
        return None
    named = {each.name: each.value for each in batch}
    rows, length = outputs[0].array.shape[:2]
    labels = named.get("labels")
    if labels is None or labels.shape[0] != rows:
        labels = np.full((rows, length + 1), _ANY, np.int64)
    positions = relevant_positions(labels, named.get("attention_mask"), recorder.options.forward_rows)
    positions = positions[positions[:, 1] < length]
    fitting = [output for output in outputs if output.array.shape[:2] == (rows, length)]
    taken = [replace(output, array=_rows(output.array, positions)) for output in fitting]
    kept = [output for output in _with_deltas(taken) if recorder.wants_module(output.name)]
    return Sampled(positions, tuple(_numbered(kept)))


def forward_records(recorder: Recorder, sampled: Sampled) -> list[Record]:
    """Records of one row of `forward`."""
    records = [plain_record(POSITIONS, sampled.positions, "int64")]
    for output in sampled.modules:
        record = array_record(recorder.names, output.name, output.array)
        records.append(replace(record, name=output.name, original=output.original))
    return records


def token_losses(batch: Sequence[Named], parts: Sequence[Output]) -> Array | None:
    """Loss of each token, float32[B, L], aligned with the labels; None where it cannot be had.

    In this order: the losses that the run computed; from the logits and targets of its cross-entropy; from the model's
    logits and the labels.
    """
    import mlx.core as mx

    labels = next((each.value for each in batch if each.name == "labels"), None)
    if labels is None:
        return None
    for losses in _each_losses(labels, parts):
        aligned = _aligned(losses.astype(mx.float32), labels.shape)
        if aligned is not None:
            return mx.where(mx.array(labels != IGNORED), aligned, mx.zeros_like(aligned))
    return None


def token_loss_record(recorder: Recorder, losses: Array | None) -> Record:
    """Record of the losses of the tokens."""
    return unrecorded(TOKEN_LOSS) if losses is None else array_record(recorder.names, TOKEN_LOSS, losses)


def _each_losses(labels: Ints, parts: Sequence[Output]) -> Iterator[Array]:
    """Candidates, the run's own first; the model's own logits last, since a loss may be computed on others."""
    import mlx.core as mx

    yield from (part.array for part in parts if part.name == TOKENS)
    for part, following in pairwise(parts):
        if (part.name, following.name) == (LOGITS, TARGETS):
            yield _cross_entropy(part.array, following.array)
    alone = [part for i, part in enumerate(parts) if part.name == LOGITS and _is_last(parts, i)]
    for part in alone:
        width = min(part.array.shape[1], labels.shape[1] - 1)
        if part.array.shape[0] == labels.shape[0] and width == labels.shape[1] - 1:
            yield _cross_entropy(part.array[:, :width], mx.array(np.maximum(labels[:, 1:], 0)))


def _is_last(parts: Sequence[Output], i: int) -> bool:
    return i + 1 == len(parts) or parts[i + 1].name != TARGETS


def _cross_entropy(logits: Array, targets: Array) -> Array:
    """-log p(target) in float32; 0 <= target < vocabulary, others are clipped and are not supervised."""
    import mlx.core as mx

    logits = logits.astype(mx.float32)
    index = mx.clip(targets, 0, logits.shape[-1] - 1)[..., None]
    score = mx.take_along_axis(logits, index, -1).squeeze(-1)
    return mx.logsumexp(logits, axis=-1) - score


def _aligned(losses: Array, shape: tuple[int, ...]) -> Array | None:
    """[B, L] with 0 in column 0, from losses of the targets 1..L-1, or of these and one behind them, flattened or not."""
    import mlx.core as mx

    rows, width = shape
    for columns in (width - 1, width):
        if losses.size == rows * columns and losses.shape[:1] in ((rows,), (rows * columns,)):
            each = losses.reshape(rows, columns)[:, : width - 1]
            return mx.concatenate([mx.zeros((rows, 1), mx.float32), each], axis=1)
    return None


def _rows(array: Array, positions: Ints) -> Array:
    import mlx.core as mx

    return array[mx.array(positions[:, 0]), mx.array(positions[:, 1])]


def _with_deltas(outputs: Sequence[Output]) -> Iterator[Output]:
    """The outputs, and before that of a LoRA layer what it adds to its base layer's output."""
    bases: dict[str, Array] = {}
    for output in outputs:
        if output.name.endswith(BASE_LAYER):
            bases[output.name.removesuffix(BASE_LAYER)] = output.array
        base = bases.pop(output.name, None)
        if base is not None and base.shape == output.array.shape and dtype_name(base) == dtype_name(output.array):
            yield Output(f"{output.name}{LORA_DELTA}", output.original, output.array - base)
        yield output


def _numbered(outputs: Sequence[Output]) -> Iterator[Output]:
    """A module's second call is `name#2`."""
    calls: Counter[str] = Counter()
    for output in outputs:
        calls[output.name] += 1
        number = calls[output.name]
        yield output if number == 1 else replace(output, name=f"{output.name}#{number}")
