"""What a cause may look at: both traces, under the comparison's names, what was found, and the rules that were fitted.

Values are float64 and read only; the last ones read are kept, up to `KEPT` bytes, because finders look at the same
records one after the other.  Nothing here judges anything.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from differ.align import SMALL, Row, Rows, Tensor
from differ.inputs import LORA_SCALE
from differ.policy import Policy, default_policy
from differ.result import Cause, Finding
from tracer.dtypes import to_float64
from tracer.reader import Trace
from tracer.schema import RNG_PREFIX, WHOLE_STEP, Phase, State

if TYPE_CHECKING:
    from differ.matching import Match, Positions

Float64 = npt.NDArray[np.float64]

# Bytes of float64 values that are kept; the record that was read last is kept whatever its size.
KEPT: Final = 64 * 2**20

# Phases in which every record that differs beyond tolerance is a finding of its own.  In the others one finding stands
# for all records that it concerns.
ONE_EACH: Final = (Phase.INIT, Phase.HPARAMS, Phase.BATCH, Phase.FORWARD, Phase.LOSS, Phase.GRAD, Phase.EVAL)


@dataclass(frozen=True)
class Context:
    """Both traces, open, and what the comparison found.  `side` is always "a" or "b".

    `findings` are in causal order; `notes` are the tally's, among them the rules that the judges fitted; `policy` is the one
    that judged.
    """

    rows_a: Rows
    rows_b: Rows
    findings: tuple[Finding, ...]
    notes: tuple[Cause, ...] = ()
    policy: Policy = field(default_factory=default_policy)
    _kept: _Kept = field(default_factory=lambda: _Kept(), repr=False, compare=False)

    @property
    def a(self) -> Trace:
        """The first trace."""
        return self.rows_a.trace

    @property
    def b(self) -> Trace:
        """The second trace."""
        return self.rows_b.trace

    def trace(self, side: str) -> Trace:
        """The trace of a side."""
        return self.rows(side).trace

    def rows(self, side: str) -> Rows:
        """The rows of a side, under the comparison's names."""
        return self.rows_a if side == "a" else self.rows_b

    def row(self, side: str, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> Row | None:
        """One row of a side, None if it was not recorded."""
        return self.rows(side).get(phase, step, micro_batch)

    # What was found.

    def findings_in(self, phase: Phase) -> tuple[Finding, ...]:
        """The findings of one phase, all steps, in causal order."""
        return tuple(finding for finding in self.findings if finding.phase == phase.label)

    def groups(self, *phases: Phase) -> Iterator[tuple[int, Phase, tuple[Finding, ...]]]:
        """Findings by step and phase, in causal order; all phases if none are named."""
        grouped: dict[tuple[int, Phase], list[Finding]] = {}
        for finding in self.findings:
            phase = Phase.parse(finding.phase)
            if not phases or phase in phases:
                grouped.setdefault((finding.step, phase), []).append(finding)
        for (step, phase), found in sorted(grouped.items()):
            yield step, phase, tuple(found)

    def rules(self, phase: Phase) -> tuple[Cause, ...]:
        """Rules that the judges fitted in a phase, one a side: notes with the id `rule` and the rule as parameters."""
        return tuple(note for note in self.notes if note.id == "rule" and note.phase == phase.label)

    def odd_side(self, phase: Phase, step: int) -> str | None:
        """The side that follows no rule where the other one does, in a phase that is replayed; None if that can't be told."""
        follow = {note.side for note in self.rules(phase) if note.step == step and note.side is not None}
        if len(follow) != 1:
            return None
        return "b" if follow == {"a"} else "a"

    def steps(self) -> tuple[int, ...]:
        """Steps that both traces have, step 0 included."""
        other = set(self.b.steps)
        return tuple(step for step in self.a.steps if step in other)

    def micro_batches(self, phase: Phase, step: int) -> tuple[int, ...]:
        """Micro-batches of a row that both sides recorded; `(WHOLE_STEP,)` for a phase with one row a step."""
        other = set(self.b.micro_batches(phase, step))
        return tuple(number for number in self.a.micro_batches(phase, step) if number in other)

    # Records.

    def names(self, side: str, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> tuple[str, ...]:
        """Names of the records of a row, in the side's own order; empty if the row was not recorded."""
        row = self.row(side, phase, step, micro_batch)
        return () if row is None else tuple(row.positions)

    def differing(self, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> tuple[str, ...]:
        """Names on both sides whose tensors can be read and whose bits, dtype or shape differ, in a's order."""
        a, b = self.row("a", phase, step, micro_batch), self.row("b", phase, step, micro_batch)
        if a is None or b is None or a.view.seal == b.view.seal:
            return ()
        common = (name for name in a.positions if name in b.positions and a.stored(name) and b.stored(name))
        return tuple(name for name in common if not _same_bits(a, b, name))

    def suspects(self, phase: Phase, step: int, micro_batch: int = WHOLE_STEP) -> tuple[str, ...]:
        """Records that a finding of this step and phase may concern.

        Where each record is judged for itself those with a finding; where one finding stands for several (clipping, the
        optimizer) all that differ.
        """
        shown = None if micro_batch == WHOLE_STEP else micro_batch
        found = [f for f in self.findings if (f.step, f.phase, f.micro_batch) == (step, phase.label, shown)]
        if phase not in ONE_EACH:
            return self.differing(phase, step, micro_batch) if found else ()
        return tuple(finding.name for finding in found if finding.name is not None)

    def values(self, side: str, phase: Phase, step: int, name: str, micro_batch: int = WHOLE_STEP) -> Float64 | None:
        """A record as float64 in canonical shape, read only; aliases are followed, the user's name rules applied.

        Of phase `forward` the rows at the positions that both sides have, see `positions`.
        None if there is no such record, it has no value, or the file holds only its digest.  Raises Damaged.
        """
        key = (side, phase, step, name, micro_batch)
        known = self._kept.get(key)
        if known is not None:
            return known
        row = self.row(side, phase, step, micro_batch)
        if row is None or name not in row.positions or not row.stored(name):
            return None
        matched = self._matched(side, phase, step, micro_batch)
        tensor = (row if matched is None else matched).read(name)
        values = _float64(tensor)
        self._kept.add(key, values)
        return values

    def positions(self, step: int, micro_batch: int) -> Positions | None:
        """(row, position) in the batch of each row of `values` of phase `forward`, int64[n, 2]; None if that is not known."""
        found = _match(*(self.row(side, Phase.FORWARD, step, micro_batch) for side in "ab"))
        return None if found is None else found.positions

    def _matched(self, side: str, phase: Phase, step: int, micro_batch: int) -> Row | None:
        """A row of `forward` at the positions that both sides have."""
        if phase is not Phase.FORWARD:
            return None
        a, b = (self.row(one, phase, step, micro_batch) for one in "ab")
        found = _match(a, b)
        if a is None or b is None or found is None:
            return None
        return found.rows(a, b)["ab".index(side)]

    def pair(self, phase: Phase, step: int, name: str, micro_batch: int = WHOLE_STEP) -> tuple[Float64, Float64] | None:
        """Both sides of a record, see `values`; None if a side has no value or the shapes differ."""
        a, b = (self.values(side, phase, step, name, micro_batch) for side in "ab")
        return None if a is None or b is None or a.shape != b.shape else (a, b)

    def scalar(self, side: str, phase: Phase, step: int, name: str, micro_batch: int = WHOLE_STEP) -> float | None:
        """A one-element record as a number, None if there is none."""
        row = self.row(side, phase, step, micro_batch)
        return None if row is None else row.scalar(name)

    def dtype(self, side: str, phase: Phase, step: int, name: str, micro_batch: int = WHOLE_STEP) -> str | None:
        """dtype of the run that a record was stored in, `float32`, `bfloat16`, `int64` …; None if there is no record."""
        row = self.row(side, phase, step, micro_batch)
        return None if row is None or name not in row.positions else row.entry(name).dtype

    def state(self, side: str, phase: Phase, step: int, name: str, micro_batch: int = WHOLE_STEP) -> State | None:
        """State of a record, None if there is none of that name."""
        row = self.row(side, phase, step, micro_batch)
        return None if row is None or name not in row.positions else row.state(name)

    def hparams(self, side: str, step: int) -> dict[str, float]:
        """All numbers of the optimizer's groups at a step, `group0.lr` …, flags as 0 and 1; empty if not recorded."""
        row = self.row(side, Phase.HPARAMS, step)
        if row is None:
            return {}
        found = {name: row.scalar(name) for name in row.positions}
        return {name: value for name, value in found.items() if value is not None}

    def trainable(self, side: str) -> frozenset[str]:
        """Names of the parameters that a side trains, as recorded at init."""
        row = self.row(side, Phase.INIT, 0)
        if row is None:
            return frozenset()
        return frozenset(
            name
            for name in row.positions
            if row.entry(name).dataset and not name.startswith(RNG_PREFIX) and not name.endswith(LORA_SCALE)
        )


class _Kept:
    """The records that were looked at last, `KEPT` bytes of them."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[Any, ...], Float64] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[Any, ...]) -> Float64 | None:
        """A record, if it is kept."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key]

    def add(self, key: tuple[Any, ...], values: Float64) -> None:
        """Keep a record that was not kept, and let go of the oldest ones."""
        self._values[key] = values
        self._bytes += values.nbytes
        while len(self._values) > 1 and self._bytes > KEPT:
            self._bytes -= self._values.popitem(last=False)[1].nbytes


def _float64(tensor: Tensor) -> Float64:
    """A tensor in its shape, read only; of a small one what is kept of it anyway."""
    if tensor.size <= SMALL:
        return tensor.block(0, tensor.size).reshape(tensor.shape)
    values = to_float64(tensor.stored, tensor.dtype)
    values.flags.writeable = False
    return values


def _match(a: Row | None, b: Row | None) -> Match | None:
    """The common positions of two rows of `forward`, if there are both."""
    if a is None or b is None:
        return None
    from differ.matching import match

    return match(a, b)


def _same_bits(a: Row, b: Row, name: str) -> bool:
    digest = a.digest(name)
    return bool(digest) and digest == b.digest(name) and a.entry(name).dtype == b.entry(name).dtype
