"""Line up the records of two rows by canonical name, whatever order and layout either side has.

`Rows` gives a trace's rows under the names that the comparison uses: canonical, then renamed by the user's own rules.
Nothing is guessed: a name without a counterpart is reported with the nearest candidates and never paired with one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tracer.dtypes import DTYPES, is_float, to_float64
from tracer.errors import BadConfig
from tracer.names import TRANSPOSED, Rule, apply_rules, split_state_name
from tracer.reader import Layout, RowView, Trace
from tracer.schema import WHOLE_STEP, IndexEntry, Phase, State

# Elements that are converted to float64 at a time, so that a comparison needs no second copy of a large tensor.
BLOCK = 2**20
# Tensors of up to so many elements are kept as float64 beside what was stored, and the latest of them, so many elements in
# all, by their rows; the smallest count as TINY, because they take memory beside their elements.
SMALL = 2**14
KEPT = 2**21
TINY = 2**8
# Rows that are kept; a replay looks at those of a step and of the one before.
LATEST = 16
# Small derived values that are kept: a long run has some of every step.
REMEMBERED = 4096


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a layout as the comparison uses them: name -> position, and the positions that a rule transposes."""

    positions: Mapping[str, int]
    transposed: frozenset[int]


@dataclass(frozen=True)
class Row:
    """One row of one trace under the comparison's names."""

    view: RowView
    names: Names
    kept: Kept

    # Whether only a part of each record is looked at.
    partial: ClassVar[bool] = False

    @cached_property
    def positions(self) -> Mapping[str, int]:
        """Name -> position of the record."""
        return self.names.positions

    # What is asked of every record again and again, remembered as long as the row is kept.

    @cached_property
    def _entries(self) -> tuple[IndexEntry, ...]:
        return self.view.layout.entries

    @cached_property
    def _states(self) -> dict[str, State]:
        return {}

    @cached_property
    def _readable(self) -> dict[str, bool]:
        return {}

    def entry(self, name: str) -> IndexEntry:
        """Index entry of a record; its shape is the recorded one (see `shape`)."""
        return self._entries[self.positions[name]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a record, the user's transposition applied."""
        i = self.positions[name]
        shape = self._entries[i].shape
        return (*shape[:-2], shape[-1], shape[-2]) if i in self.names.transposed else shape

    def state(self, name: str) -> State:
        """State of a record."""
        known = self._states.get(name)
        if known is None:
            known = self._states[name] = self.view.state(self.positions[name])
        return known

    def digest(self, name: str) -> bytes:
        """Digest of a record's bytes; empty where a transposition makes digests incomparable."""
        i = self.positions[name]
        return b"" if i in self.names.transposed else self.view.digest(i)

    def l2(self, name: str) -> float:
        """L2 norm of a record's finite elements, from the recorded statistics."""
        return float(self.view.stats[self.positions[name], 0])

    def stored(self, name: str) -> bool:
        """Whether the tensor can be read, as opposed to its digest and statistics only."""
        known = self._readable.get(name)
        if known is None:
            known = self.state(name) in (State.VALUE, State.ZERO) and self.view.stored(self.positions[name])
            self._readable[name] = known
        return known

    def read(self, name: str) -> Tensor:
        """The tensor of a record; raises Damaged."""
        key = (self.view.phase, self.view.step, self.view.micro_batch, name)
        known = self.kept.get(key)
        if known is not None:
            return known
        i = self.positions[name]
        values = self.view.read(i)
        if i in self.names.transposed:
            values = np.ascontiguousarray(np.swapaxes(values, -1, -2))
        tensor = Tensor(values, self._entries[i].dtype)
        self.kept.add(key, tensor)
        return tensor

    @cached_property
    def float_state(self) -> Mapping[str, frozenset[str]]:
        """Of a row of `opt_state`: parameter -> kinds of float state that are stored of it, counters aside."""
        found: dict[str, set[str]] = {}
        for name in self.positions:
            parameter, kind = split_state_name(name)
            if parameter and kind != "step" and is_float(self.entry(name).dtype) and self.stored(name):
                found.setdefault(parameter, set()).add(kind)
        return {parameter: frozenset(kinds) for parameter, kinds in found.items()}

    def scalar(self, name: str) -> float | None:
        """A one-element record as a number; None if there is none of that name, or no value in it."""
        if name not in self.positions or not self.stored(name):
            return None
        values = self.read(name).block(0, 1)
        return float(values[0]) if values.size else None


class Tensor:
    """A record's tensor as stored (bfloat16 as bits); `block` gives float64 pieces of it in canonical order.

    `size`: number of elements; `shape`: the canonical one.  Never changed once it is made.
    """

    __slots__ = ("_flat", "_float64", "dtype", "shape", "size", "stored")

    def __init__(self, stored: npt.NDArray[Any], dtype: str) -> None:
        self.stored, self.dtype = stored, dtype
        self.size, self.shape = stored.size, stored.shape
        self._flat: npt.NDArray[Any] | None = None
        self._float64: npt.NDArray[np.float64] | None = None

    def block(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Elements start..stop as float64, 1-D; not to be written to."""
        if start == 0 and stop >= self.size and self.size <= SMALL:
            if self._float64 is None:  # a small tensor is looked at again and again
                self._float64 = to_float64(self.raw(0, stop), self.dtype)
                self._float64.flags.writeable = False
            return self._float64
        return to_float64(self.raw(start, stop), self.dtype)

    def blocks(self) -> range:
        """Starts of the blocks of `BLOCK` elements."""
        return range(0, self.size, BLOCK)

    def raw(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Elements start..stop as stored."""
        if self._flat is None:
            self._flat = self.stored.reshape(-1)
        return self._flat[start:stop]

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: str = "float32") -> Tensor:
        """A tensor of zeros that takes no memory: an optimizer's state before its first step."""
        return Tensor(np.broadcast_to(np.zeros((), DTYPES[dtype]), shape), dtype)


class Kept:
    """The small tensors of one trace that were read last: a comparison looks at each of them several times."""

    def __init__(self) -> None:
        self._tensors: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._elements = 0
        self.get = self._tensors.get

    def add(self, key: tuple[object, ...], tensor: Tensor) -> None:
        """Keep a tensor that was not kept, if it is a small one, and let go of the oldest."""
        if tensor.size > SMALL:
            return
        self._tensors[key] = tensor
        self._elements += max(tensor.size, TINY)
        while self._elements > KEPT:
            self._elements -= max(self._tensors.popitem(last=False)[1].size, TINY)


class Rows:
    """The rows of one trace, under the names that the comparison uses."""

    def __init__(self, trace: Trace, rules: tuple[Rule, ...] = ()) -> None:
        self.trace = trace
        self._rules = rules
        self._names: dict[bytes, Names] = {}
        self._memory: OrderedDict[tuple[object, ...], Any] = OrderedDict()
        self._latest: OrderedDict[tuple[int, int, int], Row | None] = OrderedDict()
        self._kept = Kept()
        self._lately: OrderedDict[tuple[object, ...], Any] = OrderedDict()

    def get(self, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> Row | None:
        """One row, or None if it was not recorded; the latest ones are kept."""
        key = (phase, step, micro_batch)
        if key in self._latest:
            return self._latest[key]
        view = self.trace.row(phase, step, micro_batch)
        row = None if view is None else Row(view, self._layout_names(view.layout), self._kept)
        self._latest[key] = row
        if len(self._latest) > LATEST:
            self._latest.popitem(last=False)
        return row

    def remember(self, key: tuple[object, ...], compute: Callable[[], Any]) -> Any:
        """A small derived value, computed once as long as it is among the latest ones."""
        if key in self._memory:
            return self._memory[key]
        value = self._memory[key] = compute()
        if len(self._memory) > REMEMBERED:
            self._memory.popitem(last=False)
        return value

    def lately(self, key: tuple[object, ...], compute: Callable[[], Any]) -> Any:
        """What is made of whole rows, and holds them: only the last two are kept."""
        if key in self._lately:
            return self._lately[key]
        value = self._lately[key] = compute()
        if len(self._lately) > 2:
            self._lately.popitem(last=False)
        return value

    def _layout_names(self, layout: Layout) -> Names:
        known = self._names.get(layout.digest)
        if known is None:
            known = self._names[layout.digest] = _rename(layout, self._rules)
        return known


def _rename(layout: Layout, rules: tuple[Rule, ...]) -> Names:
    if not rules:
        return Names(layout.positions, frozenset())
    positions: dict[str, int] = {}
    transposed = set()
    for i, entry in enumerate(layout.entries):
        parameter, slash, kind = entry.name.partition("/")
        canonical = apply_rules(parameter, rules)
        name = canonical.name + slash + kind
        if name in positions:
            raise BadConfig(f"the name rules give two records of {layout.phase.label} the name {name}")
        positions[name] = i
        if canonical.transform == TRANSPOSED and len(entry.shape) >= 2:
            transposed.add(i)
    return Names(positions, frozenset(transposed))


@dataclass(frozen=True, slots=True)
class Pairing:
    """Names of two rows: on both sides (in a's order), on one side only."""

    common: tuple[str, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


@dataclass(slots=True)
class Aligner:
    """Pairs the names of two rows and remembers the answer: the same layouts come again at every step."""

    _known: dict[tuple[bytes, bytes], Pairing] = field(default_factory=dict)

    def pair(self, a: Row, b: Row) -> Pairing:
        """Pairing of two rows."""
        key = (a.view.layout.digest, b.view.layout.digest)
        pairing = self._known.get(key)
        if pairing is None:
            pairing = self._known[key] = Pairing(
                tuple(name for name in a.positions if name in b.positions),
                tuple(name for name in a.positions if name not in b.positions),
                tuple(name for name in b.positions if name not in a.positions),
            )
        return pairing
