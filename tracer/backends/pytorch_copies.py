"""Copies of many tensors of a live run, made together.

A step of a LoRA run has a thousand small tensors, and nearly all that the copy of one costs is the calls.  Here the tensors of
one dtype and device are laid out one after the other by one call of torch, and fetched by one copy; what is handed on are views
of it.  Invariants: the bits are those that `take` finds, nothing is written to a tensor and no graph grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.backends.pytorch_tensors import Taken, as_numpy, take
from tracer.dtypes import DTYPES

# Bytes that are laid out at a time: on a device they are there twice until they are fetched.  A larger tensor is taken alone.
TOGETHER: Final = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Copies:
    """Tensors of one dtype, one after the other in one array: `values` [all of their elements], bfloat16 as bits."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    values: npt.NDArray[Any]

    def each(self) -> Iterator[Taken]:
        """The tensors, in order; their arrays are views."""
        start = 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            yield Taken(self.values[start:stop].reshape(shape), self.dtype, shape)
            start = stop

    def same_bits(self, others: Sequence[Taken | None]) -> bool:
        """Whether others, one for each, are equal to the bit."""
        arrays: list[npt.NDArray[Any]] = []
        for shape, other in zip(self.shapes, others, strict=True):
            if other is None or other.data is None or other.shape != shape or other.dtype != self.dtype:
                return False
            arrays.append(other.data.reshape(-1))
        bits = f"u{self.values.dtype.itemsize}"
        return bool(np.array_equal(np.concatenate(arrays).view(bits), self.values.view(bits)))


def groups_of_plain(tensors: Sequence[Any]) -> tuple[list[list[int]], list[int]]:
    """Indices of tensors that can be copied together, group by group, and of those that are taken alone.

    Plain are strided tensors of torch's own two classes.  A group is of one dtype and device, at most TOGETHER bytes.
    """
    import torch

    groups: list[list[int]] = []
    filling: dict[tuple[Any, Any], tuple[list[int], int]] = {}
    for i, tensor in enumerate(tensors):
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.is_meta or not _name(tensor.dtype):
            groups.append([i])
            continue
        key, size = (tensor.dtype, tensor.device), tensor.nbytes
        group, filled = filling.get(key, ([], TOGETHER))
        if filled + size > TOGETHER:
            groups.append(group := [])
            filled = 0
        group.append(i)
        filling[key] = group, filled + size
    return [group for group in groups if len(group) > 1], [group[0] for group in groups if len(group) == 1]


def copy_together(tensors: Sequence[Any]) -> Copies:
    """Copy a group of plain tensors, two or more of one dtype and device."""
    import torch
    from torch._utils import _flatten_dense_tensors

    dtype = _name(tensors[0].dtype)
    with torch.no_grad():
        values = as_numpy(_flatten_dense_tensors(tensors), dtype)
    return Copies(tuple(tuple(tensor.shape) for tensor in tensors), dtype, values)


def take_all(tensors: Sequence[Any]) -> list[Taken]:
    """What `take` finds of each tensor."""
    groups, alone = groups_of_plain(tensors)
    found = {i: take(tensors[i]) for i in alone}
    for group in groups:
        found.update(zip(group, copy_together([tensors[i] for i in group]).each(), strict=True))
    return [found[i] for i in range(len(tensors))]


@cache
def _name(dtype: Any) -> str:
    """Name of a dtype of torch that numpy can hold; empty for another."""
    name = str(dtype).removeprefix("torch.")
    return name if name in DTYPES else ""
