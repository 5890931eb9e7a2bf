"""Format 1 of a trace: what is in the file, and the words for it.

This module is the single description of the format: the writer and the reader both take every name from
here, and `docs/format.md` is generated from it (`python -m tracer.schema`).  It must never import h5py or a
framework, so that a reader of any kind can use it.

Layout of the HDF5 file, default file version, no filters on data:

    /                                       attributes: format, tool
    /committed            int64[1]          number of commits whose rows are complete; readers trust only this
    /steps                STEP_DTYPE[S]     one entry per commit: the step, how many rows it has, its seal; a step is one
                                            commit, its `eval` rows (logged after it) are a second one
    /meta/<document>      string            JSON: env, declared, observed, end; attribute `digest`
    /<phase>/<k>/         group             one *layout*: a fixed list of records; attributes: digest, records
    /<phase>/<k>/index    INDEX_DTYPE[n]    one entry per record (gzip)
    /<phase>/<k>/rows     ROW_DTYPE[R]      step, micro-batch and seal of each row
    /<phase>/<k>/digest   V16[R, n]         xxh3_128 of each record's bytes
    /<phase>/<k>/state    uint8[R, n]       State of each record
    /<phase>/<k>/stats    float64[R, n, 7]  STATS of each record
    /<phase>/<k>/<dtype>  dtype[R, N]       the rows: all stored records of that dtype, packed, chunk [1, N]
    /<phase>/<k>/sketch   float32[R, 61 m]  in a fingerprint: a random projection of each of m records, instead of them
    /<phase>/<k>/sketch_digest  V16[R, 1]   xxh3_128 of a row's sketches and statistics, which its seal does not cover

    /again/<phase>/<k>/   as above          rows of earlier steps that were written again with their tensors, in place of the
                                            first ones; their commit's entry in /steps has the step negated

A phase gets a new layout when the set of its records, or a shape or dtype, changes.

A *fingerprint* is a trace whose large tensors were replaced by projections (`trace shrink`): such a record's `dataset` is
`sketch`, `offset` the first of its 61 numbers (see tracer/sketch.py), and its digest, state and statistics are those of the
tensor, so that it is not stored and is still compared.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import xxhash

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# History of the format.  1: first release.
FORMAT: Final = 1

COMMITTED: Final = "committed"
STEPS: Final = "steps"
META: Final = "meta"
AGAIN: Final = "again"
INDEX: Final = "index"
ROWS: Final = "rows"
DIGEST: Final = "digest"
STATE: Final = "state"
STATS_TABLE: Final = "stats"
SKETCH: Final = "sketch"
SKETCH_DIGEST: Final = "sketch_digest"
# Numbers in a sketch: a prime, see tracer/sketch.py.
SKETCH_BUCKETS: Final = 61

# The documents under /meta, in the order in which they are written.
DOCUMENTS: Final = {
    "env": "versions, device, threads, operating system, git commit, arguments; never decides a verdict",
    "declared": "settings as the program declared them (path, dtype, LoRA rank, clip mode ...)",
    "observed": "settings as the recorder found them in the live objects, as of the first step",
    "end": "finished or not, why recording stopped, number of commits",
}

# The document `end` of a trace that is being written, without the blanks behind it.
RUNNING: Final = b'{"commits": 0, "finished": false, "reason": "still running"}'

# A micro-batch number for the phases that have one row per step.
WHOLE_STEP: Final = -1

# Per-record statistics, float64, in this order. l2, min, max and mean are over the finite elements.
STATS: Final = ("l2", "min", "max", "mean", "nan", "inf", "zeros")

DIGEST_BYTES: Final = 16

# Numpy structured types of the tables, as lists so that this module imports nothing.
STEP_DTYPE: Final = [("step", "<i8"), ("rows", "<i8"), ("seal", "V16")]
ROW_DTYPE: Final = [("step", "<i8"), ("micro_batch", "<i8"), ("seal", "V16")]
# Names are UTF-8 in fixed-length strings; their length is that of the longest one.
INDEX_FIELDS: Final = (
    ("name", "canonical name (that of the Hugging Face checkpoint)"),
    ("dtype", "dtype of the run, see DTYPES in tracer/dtypes.py"),
    ("shape", "canonical shape, `8,64`; empty for a scalar"),
    (
        "dataset",
        "which packed dataset of the layout holds it; empty if nothing is stored here, `sketch`: only its projection",
    ),
    ("offset", "first element in that dataset's row"),
    ("original", "the framework's own name"),
    (
        "transform",
        "how the framework's layout became the canonical one: empty, or `T` (transposed); where a rank holds a part of it, then "
        "`shard 16/64,0/32`, per dimension the first element and the size of the whole",
    ),
    ("alias_of", "`phase/name` that holds the same bytes at the same step; empty if none"),
)


class Phase(enum.IntEnum):
    """Phases of a step in causal order; the order decides what "first" means."""

    CONFIG = 0
    INIT = 1
    HPARAMS = 2
    BATCH = 3
    FORWARD = 4
    LOSS = 5
    GRAD = 6
    CLIPPED_GRAD = 7
    OPT_STATE = 8
    PARAM = 9
    EVAL = 10

    @property
    def label(self) -> str:
        """Name in the file, on the command line and in reports: `clipped_grad`."""
        return self.name.lower()

    @classmethod
    def parse(cls, label: str) -> Phase:
        """Phase of a label; raises KeyError."""
        return cls[label.upper()]

    @property
    def per_micro_batch(self) -> bool:
        """Whether the phase has one row per micro-batch rather than one per step."""
        return self in (Phase.BATCH, Phase.FORWARD, Phase.LOSS)


class State(enum.IntEnum):
    """What a record holds at a step; the four are never mixed up."""

    VALUE = 0
    ZERO = 1  # every element is zero
    NONE = 2  # the framework produced nothing (no gradient)
    UNRECORDED = 3  # there was something, the recorder did not take it

    @property
    def label(self) -> str:
        """Word in a report."""
        return self.name.lower()


# First record of a row of `forward`, int64[n, 2]: (row, position) in the batch of each row of the other records, ascending.
POSITIONS: Final = "positions"
# Loss of each token, float32[B, L], aligned with `labels`; 0 where a position is not supervised.
TOKEN_LOSS: Final = "token_loss"

# Records under these prefixes are shown, never judged: they have no counterpart in another framework.
RNG_PREFIX: Final = "rng."
REPORTED_PREFIX: Final = "reported."


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What stays of a tensor that is not carried along: its digest, STATS float64[7], and sketch float32[61] if it has one."""

    digest: bytes
    stats: npt.NDArray[np.float64]
    sketch: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One tensor of one phase at one step, on its way into a file.

    `data` is in canonical layout (it may be a strided view of the run's own array, never of live memory);
    bfloat16 travels as uint16 bits.  None for a state of NONE or UNRECORDED.  With `stored=False` the file
    keeps the digest and the statistics only, as for frozen weights; a `fingerprint` gives them without the data.
    """

    name: str
    data: npt.NDArray[np.generic] | None
    dtype: str
    shape: tuple[int, ...]
    original: str = ""
    transform: str = ""
    alias_of: str = ""
    stored: bool = True
    state: State = State.VALUE
    fingerprint: Fingerprint | None = None

    @property
    def sketched(self) -> bool:
        """Whether the file keeps a sketch of it."""
        return self.fingerprint is not None and self.fingerprint.sketch is not None


@dataclass(frozen=True, slots=True)
class Row:
    """All records of one phase at one step (and micro-batch)."""

    phase: Phase
    step: int
    micro_batch: int
    records: tuple[Record, ...]


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One entry of a layout's index, in the order of INDEX_FIELDS."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    dataset: str
    offset: int
    original: str
    transform: str
    alias_of: str

    @property
    def stored(self) -> bool:
        """Whether the tensor itself is in the file, here or where `alias_of` points."""
        return bool((self.dataset and not self.sketched) or self.alias_of) or 0 in self.shape

    @property
    def sketched(self) -> bool:
        """Whether the file holds a sketch instead of the tensor."""
        return self.dataset == SKETCH

    def as_text(self) -> tuple[str, ...]:
        """The fields as the strings that the file holds."""
        shape = ",".join(map(str, self.shape))
        return (
            self.name, self.dtype, shape, self.dataset, str(self.offset), self.original, self.transform, self.alias_of
        )  # fmt: skip

    @classmethod
    def from_text(cls, fields: Sequence[str]) -> IndexEntry:
        """Inverse of `as_text`; raises ValueError."""
        name, dtype, shape, dataset, offset, original, transform, alias_of = fields
        dims = tuple(int(size) for size in shape.split(",")) if shape else ()
        return cls(name, dtype, dims, dataset, int(offset), original, transform, alias_of)


# Seals.  A layout's digest covers its index, a row's seal covers that and the row's digests and states, and a step's seal
# covers its rows and the step before: nothing can be lost or altered without a seal that no longer fits, and two
# rows with equal seals hold the same bits.  All are xxh3_128, which finds damage and does not resist forgery.


def layout_digest(phase: Phase, entries: Sequence[IndexEntry]) -> bytes:
    """Digest of a layout: its phase and every field of its index."""
    return index_digest(phase, [entry.as_text() for entry in entries])


def index_digest(phase: Phase, texts: Sequence[Sequence[str]]) -> bytes:
    """Digest of a layout from the fields of its index as they are in the file."""
    return xxhash.xxh3_128_digest(json.dumps([phase.label, texts]).encode())


def row_seal(layout: bytes, phase: Phase, step: int, micro_batch: int, states: bytes, digests: bytes) -> bytes:
    """Seal of a row, from its layout's digest and its own states (uint8[n]) and digests (V16[n])."""
    return xxhash.xxh3_128_digest(layout + f"{phase.label} {step} {micro_batch} ".encode() + states + digests)


def sketch_digest(sketches: bytes, stats: bytes) -> bytes:
    """Digest of a row of a fingerprint: of its sketches float32[61 m] and its statistics float64[n, 7]."""
    return xxhash.xxh3_128_digest(sketches + stats)


def step_seal(previous: bytes, step: int, rows: Sequence[bytes]) -> bytes:
    """Seal of a step, from the previous step's seal (empty for the first) and its rows' seals in causal order."""
    return xxhash.xxh3_128_digest(previous + f"{step} ".encode() + b"".join(rows))
