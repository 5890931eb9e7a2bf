"""The result of a comparison: one frozen object that every reporter renders.

`to_json` is format 1 of the JSON report.  Within a format fields are added and never removed; keys are sorted, and
numbers that JSON cannot hold are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from tracer._version import DISTRIBUTION, VERSION

if TYPE_CHECKING:
    from differ.reference import ReferencePair
    from differ.series import Series

# History of the format.  1: first release.
FORMAT: Final = 1


class Verdict(enum.StrEnum):
    """What a comparison ends with; the value is the word in a report."""

    SAME = "same"
    DIVERGED = "diverged"
    INCOMPARABLE = "incomparable"

    @property
    def exit_code(self) -> int:
        """0 same, 1 diverged and nothing else, 2 no answer."""
        return {"same": 0, "diverged": 1, "incomparable": 2}[self.value]


class Kind(enum.StrEnum):
    """In which way a record differs."""

    VALUE = "value"
    MISSING_A = "missing_a"
    MISSING_B = "missing_b"
    SHAPE = "shape"
    NONFINITE = "nonfinite"
    STATE = "state"
    REPLICA = "replica"


# A value in a report: a number, or a word where there is none (a state, a shape).
Shown = float | int | str | None


@dataclass(frozen=True, slots=True)
class Finding:
    """One record that differs beyond tolerance, or is on one side only.

    `name` is None where a whole row or step is missing.  Numbers are None where they have no meaning (a digest, a
    missing record).  `required` is the tolerance that would have let it pass.  `nearest` are names on the other side
    that look like a missing one; `detail` is one sentence more.
    """

    step: int
    phase: str
    name: str | None
    kind: Kind
    micro_batch: int | None = None
    rel_l2: float | None = None
    max_abs: float | None = None
    max_ulp: int | None = None
    index: tuple[int, ...] | None = None
    a: Shown = None
    b: Shown = None
    tolerance: float | None = None
    required: float | None = None
    nearest: tuple[str, ...] = ()
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Cause:
    """A tested explanation, or a note.  `explains` is the share of the squared difference, None if untested."""

    id: str
    summary: str
    side: str | None = None
    step: int | None = None
    phase: str | None = None
    names: tuple[str, ...] = ()
    parameters: Mapping[str, Any] | None = None
    explains: float | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """How many steps were compared, and what became of the records.

    `compared` = `same_bits` + `within` + those of `diverged` that are on both sides; `propagated` differ and their
    inputs explain it; `unrecorded` are on one side only without being a finding, or not in the file.
    """

    steps: int = 0
    compared: int = 0
    same_bits: int = 0
    within: int = 0
    propagated: int = 0
    diverged: int = 0
    unrecorded: int = 0


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two traces, as a report names it.  `label` is the path or framework, `dtype` the model's."""

    path: str
    label: str
    tool: str
    format: int
    finished: bool
    steps: int
    last_step: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Worst:
    """The judged record that came nearest to its tolerance (or went furthest beyond): `margin` = observed / allowed."""

    margin: float
    step: int
    phase: str
    name: str


@dataclass(frozen=True, slots=True)
class Before:
    """What agrees before the first finding: phases of its step, last whole step that agrees, records, worst margin."""

    steps: int
    phases: tuple[str, ...]
    records: int
    margin: float


@dataclass(frozen=True, slots=True)
class PolicyUsed:
    """Which tolerances judged: the user's file if any, the dtype that chose among the defaults, the noise files."""

    file: str | None
    dtype: str
    noise: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DiffResult:
    """Everything that a comparison found.  `findings` are in causal order, `first` is the first of them.

    `reference` is what `--reference` says of each side, None where it was not asked for.
    `series` is what some reports draw; None unless `DiffOptions.series` asked for it, and not in the default JSON.
    """

    a: Side
    b: Side
    policy: PolicyUsed
    verdict: Verdict
    first: Finding | None
    causes: tuple[Cause, ...]
    notes: tuple[Cause, ...]
    counts: Counts
    margin: float
    worst: Worst | None
    before: Before | None
    findings: tuple[Finding, ...]
    series: Series | None = None
    reference: ReferencePair | None = None

    @property
    def systematic(self) -> tuple[Cause, ...]:
        """Notes on a tested effect that stays within tolerance, as opposed to those on settings or recording."""
        return tuple(note for note in self.notes if note.explains is not None)

    def to_dict(self, *, series: bool = False) -> dict[str, Any]:
        """The JSON object as plain Python: see the module's docstring.  `series` adds that field."""
        body = _plain(self if series else replace(self, series=None))
        assert isinstance(body, dict)
        if not series:
            del body["series"]
        return {"format": FORMAT, "tool": {"name": DISTRIBUTION, "version": VERSION}, **body}

    def to_json(self) -> str:
        """The result as JSON text, two spaces, keys sorted, a newline at the end."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Dataclasses, enums and mappings as JSON types; non-finite numbers as strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value
