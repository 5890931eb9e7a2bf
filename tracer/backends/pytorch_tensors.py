"""Tensors of a live PyTorch run as numpy arrays, and as records.

Invariants: nothing here draws a random number, keeps a graph alive or writes to a tensor; what is handed on is a
copy unless the caller asks for a live view.  A tensor that numpy cannot hold (sparse, sharded, on no device)
becomes an *unrecorded* record, never a guess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from tracer.dtypes import BFLOAT16, DTYPES, bf16_to_float32, float32_to_bf16, to_numpy
from tracer.names import NameMap, state_name
from tracer.recorder import make_record
from tracer.schema import Record, State
from tracer.shards import Piece, with_piece

# dtype under which something that cannot be taken is listed.
_OPAQUE: Final = "uint8"


@dataclass(frozen=True, slots=True)
class Taken:
    """A tensor as taken from the run: its array in the run's own layout (bfloat16 as uint16 bits), or None with the
    reason's state."""

    data: npt.NDArray[Any] | None
    dtype: str
    shape: tuple[int, ...]
    state: State = State.VALUE
    # Where it lies in the whole, if this process holds a part of a sharded tensor; `shape` is that of the part.
    piece: Piece | None = None


def take(tensor: Any, *, live: bool = False) -> Taken:
    """A tensor's value.  With `live=True` a CPU tensor's array shares its memory: look at it, don't keep it.

    Of a sharded tensor it is this process's part.
    """
    import torch

    if is_distributed(tensor):
        piece = piece_held(tensor)
        if piece is None:
            return Taken(None, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), State.UNRECORDED)
        part = take(local_part(tensor), live=live)
        return part if part.shape == piece.whole else replace(part, piece=piece)
    name = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(int(size) for size in tensor.shape)
    if name not in DTYPES and tensor.element_size() != 1:
        return Taken(None, _OPAQUE, (), State.UNRECORDED)
    dtype = name if name in DTYPES else _OPAQUE
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return Taken(None, dtype, shape, State.UNRECORDED)
    try:
        array = as_numpy(tensor, name)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        # A tensor subclass (sharded, quantized) that has no array of its own.
        return Taken(None, dtype, shape, State.UNRECORDED)
    # `.cpu()` has made a copy already, unless the tensor was there.
    on_cpu = tensor.device.type == "cpu"
    return Taken(array.copy() if on_cpu and not live else array, dtype, shape)


def take_frozen(tensor: Any) -> Taken:
    """A frozen weight.  It is not copied: it does not change while it waits for the writer thread, which reads it
    once for its digest, and a copy of all of them would double a big model.  On a device other than the CPU
    each is fetched when its turn comes, so that one at a time is on the host.
    """
    if tensor.device.type in ("cpu", "meta") or is_distributed(tensor):
        return take(tensor, live=True)
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        return take(tensor)
    shape = tuple(int(size) for size in tensor.shape)
    return Taken(cast("npt.NDArray[Any]", _OnDevice(tensor.detach(), name)), name, shape)


class _OnDevice:
    """Array-like that is fetched from its device when numpy asks for it."""

    def __init__(self, tensor: Any, name: str) -> None:
        self._tensor = tensor
        self._name = name
        self.shape = tuple(tensor.shape)

    def swapaxes(self, first: int, second: int) -> _OnDevice:
        """The same, transposed: a user's name rule may ask for it."""
        return _OnDevice(self._tensor.transpose(first, second), self._name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        array = as_numpy(self._tensor, self._name)
        return array if dtype is None else array.astype(dtype)


def is_distributed(tensor: Any) -> bool:
    """Whether a tensor is spread over processes (`torch.distributed.tensor.DTensor`)."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_part(tensor: Any) -> Any:
    """This process's part of a distributed tensor, sharing its memory; any other tensor is its own.  Talks to nobody."""
    import torch

    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        return tensor.detach().to_local()


def piece_held(tensor: Any) -> Piece | None:
    """Where the part that this process holds lies in a distributed tensor.

    None where there is no such box: a sum that is not done yet, a strided shard, a process outside of the mesh.
    """
    whole = tuple(int(size) for size in tensor.shape)
    start, shape = [0] * len(whole), list(whole)
    mesh, here = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    for axis, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            continue
        if type(placement).__name__ != "Shard" or here is None:
            return None
        # As torch.chunk cuts it: all parts but the last ones have the same size.
        size = shape[placement.dim]
        step = -(-size // mesh.size(axis))
        first = min(here[axis] * step, size)
        start[placement.dim] += first
        shape[placement.dim] = min(step, size - first)
    return Piece(tuple(start), whole) if tuple(local_part(tensor).shape) == tuple(shape) else None


def as_numpy(tensor: Any, name: str) -> npt.NDArray[Any]:
    """Array of a strided tensor; it shares the memory of a tensor on the CPU."""
    import torch

    plain = tensor.detach()
    if name not in DTYPES:
        return cast("npt.NDArray[Any]", plain.view(torch.uint8).cpu().numpy())
    if name == BFLOAT16:
        # numpy has no bfloat16; int16 rather than uint16, which few devices can copy.
        return cast("npt.NDArray[Any]", plain.view(torch.int16).cpu().numpy().view(np.uint16))
    return cast("npt.NDArray[Any]", plain.cpu().numpy())


def unscaled(taken: Taken, scale: float) -> Taken:
    """A gradient of a scaled loss, as `torch.amp.GradScaler` unscales it: times the float32 reciprocal."""
    if taken.data is None or scale == 1.0:
        return taken
    inverse = np.float32(1.0 / scale)
    if taken.dtype == BFLOAT16:
        return replace(taken, data=float32_to_bf16(bf16_to_float32(taken.data) * inverse))
    if taken.dtype == "float16":
        return replace(taken, data=(taken.data.astype(np.float32) * inverse).astype(np.float16))
    return replace(taken, data=taken.data * taken.data.dtype.type(inverse))


def same_bits(a: Taken, b: Taken) -> bool:
    """Whether two tensors are equal bit for bit, nan and the sign of zero included; or both are none."""
    if a.data is None or b.data is None:
        return a.state is State.NONE and b.state is State.NONE
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # Gradients are nearly always contiguous, and then no copy is made here.
    bits = f"u{a.data.dtype.itemsize}"
    return bool(np.array_equal(np.ascontiguousarray(a.data).view(bits), np.ascontiguousarray(b.data).view(bits)))


def is_share(whole: Taken, part: Taken, count: int) -> bool:
    """Whether a tensor is another divided by `count`, to the bit: by a division, or by a product with 1 / count."""
    if whole.data is None or part.data is None:
        return whole.state is State.NONE and part.state is State.NONE
    wide: type[np.floating[Any]] = np.float64 if whole.dtype == "float64" else np.float32
    numbers: npt.NDArray[Any] = to_numpy(whole.data, whole.dtype).astype(wide)
    for share in (numbers / wide(count), numbers * wide(1 / count)):
        stored = float32_to_bf16(share) if whole.dtype == BFLOAT16 else share.astype(whole.data.dtype)
        if same_bits(replace(whole, data=stored), part):
            return True
    return False


def record_of(names: NameMap, original: str, taken: Taken, *, kind: str = "", stored: bool = True) -> Record:
    """The record of a tensor under its canonical name; `kind` makes it a state of the optimizer (`exp_avg`)."""
    canonical = names(original)
    if not canonical.transform and taken.piece is None:
        # As nearly always, and a thousand times a step: said in one go.
        name = canonical.name
        if kind:
            name, original = state_name(name, kind), state_name(original, kind)
        return Record(name, taken.data, taken.dtype, taken.shape, original, stored=stored, state=taken.state)
    record = make_record(names, original, taken.data, taken.dtype, shape=taken.shape, state=taken.state, stored=stored)
    if taken.piece is not None:
        record = replace(record, transform=with_piece(record.transform, taken.piece))
    if kind:
        return replace(record, name=state_name(record.name, kind), original=state_name(original, kind))
    return record


def alias_of(record: Record, target: str) -> Record:
    """The same record without its data: a reference to `phase/name`."""
    return Record(
        record.name, None, record.dtype, record.shape, record.original, record.transform, target,
        stored=False, state=record.state,
    )  # fmt: skip


def scalar(name: str, value: float | bool, dtype: str = "float64") -> Record:
    """A scalar record, shape ()."""
    return Record(name, np.asarray(value, DTYPES[dtype]), dtype, ())


def unrecorded(name: str, dtype: str = "float32", shape: tuple[int, ...] = ()) -> Record:
    """A record that says that there was something which was not taken."""
    return Record(name, None, dtype, shape, state=State.UNRECORDED)


def no_gradient(like: Any) -> Taken:
    """What stands for the gradient of a parameter that got none."""
    name = str(like.dtype).removeprefix("torch.")
    shape = tuple(int(size) for size in like.shape)
    return Taken(None, name if name in DTYPES else _OPAQUE, shape, State.NONE)


def unrecorded_like(like: Any) -> Taken:
    """What stands for a gradient that there was, and that could not be taken."""
    return replace(no_gradient(like), state=State.UNRECORDED)


def rng_records() -> list[Record]:
    """States of the generators that the run draws from, as they are now; reading them draws nothing."""
    import torch

    records = [_rng("rng.torch", torch.get_rng_state())]
    if torch.cuda.is_initialized():
        records.append(_rng("rng.torch.cuda", torch.cuda.get_rng_state()))
    return records


def _rng(name: str, state: Any) -> Record:
    taken = take(state)
    return Record(name, taken.data, taken.dtype, taken.shape)


def numpy_rng_record() -> Record | None:
    """State of numpy's global generator (key and position, uint32[625]), which data pipelines shuffle with."""
    state = cast("Mapping[str, Any]", np.random.get_state(legacy=False))
    if state.get("bit_generator") != "MT19937":
        return None
    inner = state["state"]
    data = np.append(np.asarray(inner["key"], np.uint32), np.uint32(inner["pos"]))
    return Record("rng.numpy", data, "uint32", data.shape)
