"""Where the part of a tensor that one process holds lies in the whole, and how an index says so.

A sharded parameter is written by each rank as the box that it holds; the index entry's `transform` says where that box starts
and how large the whole is, per dimension: `shard 16/64,0/32`, after a `T` where the tensor was transposed.  All of it is in
canonical layout.  Pure; knows no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tracer.names import TRANSPOSED

SHARD: Final = "shard"


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: its first element's index and the whole tensor's shape, one number per dimension each."""

    start: tuple[int, ...]
    whole: tuple[int, ...]

    @property
    def text(self) -> str:
        """For the index: `shard 16/64,0/32`."""
        return f"{SHARD} " + ",".join(f"{at}/{size}" for at, size in zip(self.start, self.whole, strict=True))

    def transposed(self) -> Piece:
        """The same box with the last two axes exchanged."""
        if len(self.start) < 2:
            return self
        start, whole = ((*x[:-2], x[-1], x[-2]) for x in (self.start, self.whole))
        return Piece(start, whole)

    def box(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Where a piece of this shape goes in the whole."""
        return tuple(slice(at, at + size) for at, size in zip(self.start, shape, strict=True))


def with_piece(transform: str, piece: Piece) -> str:
    """A record's transform with the piece added; `piece` in the framework's own layout."""
    canonical = piece.transposed() if transform == TRANSPOSED else piece
    return f"{transform} {canonical.text}".strip()


def without_piece(transform: str) -> str:
    """A transform as it is of the whole tensor."""
    return transform.partition(SHARD)[0].strip()


def piece_of(transform: str) -> Piece | None:
    """The piece that a transform speaks of, or None for a whole tensor.  Raises ValueError."""
    _, found, text = transform.partition(SHARD)
    if not found:
        return None
    pairs = [pair.partition("/") for pair in text.strip().split(",")]
    return Piece(tuple(int(at) for at, _, _ in pairs), tuple(int(size) for _, _, size in pairs))
