"""State of one comparison while the engine walks through the steps: what has diverged, and what that explains.

The judges share it.  It answers "is this news?": a difference whose inputs differ is propagated, one that was found at
an earlier step is repeated, and both are counted, not reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from differ.align import Aligner, Row, Rows, Tensor
from differ.compare import Distance, element, max_ulp, multi_index
from differ.inputs import Inputs
from differ.options import DiffOptions, Measurement
from differ.policy import Policy, Tolerance
from differ.result import Cause, Finding, Kind
from differ.tally import Tally
from tracer.dtypes import coarser
from tracer.names import split_state_name
from tracer.schema import TOKEN_LOSS, WHOLE_STEP, Phase

if TYPE_CHECKING:
    from differ.noise import NoiseFloor
    from differ.replay.rules.base import Rule


@dataclass(frozen=True)
class RowPair:
    """The same row of both traces."""

    phase: Phase
    step: int
    micro_batch: int
    a: Row
    b: Row

    @property
    def shown_micro_batch(self) -> int | None:
        """Micro-batch as a report shows it."""
        return None if self.micro_batch == WHOLE_STEP else self.micro_batch

    def dtype(self, name: str) -> str:
        """Coarser dtype of a record's two sides."""
        return coarser(self.a.entry(name).dtype, self.b.entry(name).dtype)


@dataclass(slots=True)
class KnownRules:
    """Rules that tensors of a phase were seen to follow, so that the next one is asked for them first.

    `common`: rules of both sides of a tensor.  `parted`: the nearest two where the sides follow different ones.  `own`: rules
    of one side where the other follows none.
    """

    common: list[Rule] = field(default_factory=list)
    parted: list[tuple[Rule, Rule]] = field(default_factory=list)
    own: dict[str, list[Rule]] = field(default_factory=lambda: {"a": [], "b": []})


@dataclass(slots=True)
class Session:
    """One comparison in progress.

    `dtype` is the coarser of the two models'.  `model_blocked`: the two models differ from the start, so that their
    outputs tell nothing; `step_blocked`: something upstream in this step diverged.  `noise`: the floor of the twins, if any.
    A phase that is left out of the judgement explains nothing, so it blocks nothing.
    """

    a: Rows
    b: Rows
    options: DiffOptions
    tally: Tally
    dtype: str
    inputs: Inputs
    noise: NoiseFloor | None = None
    aligner: Aligner = field(default_factory=Aligner)
    model_blocked: bool = False
    step_blocked: bool = False
    structural: set[str] = field(default_factory=set)
    # Parameters that one side trains and its optimizer does not hold.
    unheld: set[str] = field(default_factory=set)
    seen: set[tuple[object, ...]] = field(default_factory=set)
    followed: dict[str, set[str]] = field(default_factory=lambda: {"a": set(), "b": set()})
    noted: set[tuple[object, ...]] = field(default_factory=set)
    diverged_at: dict[Phase, int] = field(default_factory=dict)
    # step -> micro-batch -> what either side multiplied the mean of its token losses by, where that differs.
    loss_weights: dict[int, Mapping[int, tuple[float, float]]] = field(default_factory=dict)
    # How a and b may reduce their losses, once the gradients of a step have borne it out.
    reductions: frozenset[tuple[str, str]] = frozenset()
    known: dict[Phase, KnownRules] = field(default_factory=dict)
    # Where the logarithm of a ratio of all of a phase's records may be, from each step that shows one.
    ratios: dict[Phase, tuple[float, float]] = field(default_factory=dict)
    # The first step that starts from parameters which what was left out moved apart, and how far that was looked for.
    parted_at: int | None = None
    looked_to: int = 0

    @property
    def policy(self) -> Policy:
        """The tolerances."""
        return self.options.policy

    def tolerance(self, pair: RowPair, name: str) -> Tolerance:
        """Tolerance of a record by the coarser of the runs' and the record's dtypes.

        The losses of single tokens have the noise of the logits that each is computed from; a reduced loss averages it out.
        """
        dtype = coarser(self.dtype, pair.dtype(name))
        if name == TOKEN_LOSS:
            own = self.policy.tolerance(pair.phase, dtype, name)
            return own if own.explicit else self.policy.tolerance(Phase.FORWARD, dtype, name)
        return self.policy.tolerance(pair.phase, dtype, name)

    def block_step(self, phase: Phase) -> None:
        """A divergence in a phase explains what comes after it in this step."""
        self.step_blocked |= self.options.wants_phase(phase)

    def block_model(self, phase: Phase) -> None:
        """A divergence in a phase explains all that the model computes from here on."""
        self.model_blocked |= self.options.wants_phase(phase)

    def first_time(self, *key: object) -> bool:
        """Whether a divergence with this key is new; remembers it."""
        new = key not in self.seen
        self.seen.add(key)
        return new

    def first_step_of(self, phase: Phase, step: int) -> bool:
        """Whether a phase has not diverged before this step: a model that differs goes on differing."""
        return self.diverged_at.get(phase, step) == step

    def note_once(self, note: Cause) -> None:
        """Add a note unless the same was said of the same side and phase."""
        key = (note.id, note.side, note.phase, note.summary)
        if key not in self.noted:
            self.noted.add(key)
            self.tally.note(note)

    def measured(
        self,
        pair: RowPair,
        name: str,
        observed: float,
        tolerance: float,
        *,
        distance: float = 0.0,
        diverged: bool = False,
    ) -> None:
        """Count a judged record."""
        dtype = coarser(self.dtype, pair.dtype(name))
        measurement = Measurement(pair.step, pair.phase, pair.micro_batch, name, dtype, observed, distance, tolerance)
        self.tally.measured(measurement, diverged=diverged)


def structural_key(phase: Phase, name: str) -> str:
    """What a missing or misshapen record is remembered by: once found, the same parameter is no news in later phases."""
    if phase is Phase.OPT_STATE:
        parameter, _ = split_state_name(name)
        return parameter or f"{phase.label}:{name}"
    if phase in (Phase.INIT, Phase.GRAD, Phase.CLIPPED_GRAD, Phase.PARAM):
        return name
    return f"{phase.label}:{name}"


def structure_finding(
    pair: RowPair, name: str, kind: Kind, *, detail: str = "", nearest: tuple[str, ...] = ()
) -> Finding:
    """A finding without numbers: missing, shape, state."""
    a: str | None = None
    b: str | None = None
    if kind is Kind.SHAPE:
        a, b = str(list(pair.a.shape(name))), str(list(pair.b.shape(name)))
    elif kind is Kind.STATE:
        a, b = pair.a.state(name).label, pair.b.state(name).label
    return Finding(
        pair.step, pair.phase.label, name, kind, pair.shown_micro_batch, a=a, b=b, detail=detail, nearest=nearest
    )


def value_finding(
    pair: RowPair,
    name: str,
    measured: Distance,
    tensors: tuple[Tensor, Tensor],
    *,
    observed: float | None,
    tolerance: float,
    required: float | None,
    at: int | None = None,
    detail: str = "",
) -> Finding:
    """A finding with numbers; `at` is the flat index to show, by default that of the largest difference."""
    a, b = tensors
    odd = measured.nonfinite >= 0
    flat = measured.nonfinite if odd else measured.at if at is None else at
    return Finding(
        step=pair.step,
        phase=pair.phase.label,
        name=name,
        kind=Kind.NONFINITE if odd else Kind.VALUE,
        micro_batch=pair.shown_micro_batch,
        rel_l2=observed,
        max_abs=measured.max_abs,
        max_ulp=max_ulp(a, b),
        index=multi_index(flat, pair.a.shape(name)),
        a=element(a, flat) if a.size else None,
        b=element(b, flat) if b.size else None,
        tolerance=tolerance,
        required=None if odd else required,
        detail=detail,
    )
