"""What to compare, as one frozen object that travels through the engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from differ.policy import Policy, default_policy
from tracer.names import Rule
from tracer.schema import Phase

if TYPE_CHECKING:
    from differ.reference import References


# Engines that `--reference` may name, and the dtypes that they compute in: see `differ.reference`.
ENGINES: Final = ("torch",)
ENGINE_DTYPES: Final = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One judged record, handed to `DiffOptions.probe`: what was seen, and what would have been allowed.

    `observed` is the relative L2 error (relative difference for a scalar), `distance` the distance between the two
    sides' inputs that the tolerance was grown by, `dtype` the one that chose the tolerance.
    """

    step: int
    phase: Phase
    micro_batch: int
    name: str
    dtype: str
    observed: float
    distance: float
    tolerance: float


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """Options of one comparison.

    `rules` rename the records of both sides (`trace diff --map`).  `only` and `omit` are globs on names, `steps` an
    inclusive range, `phases` a choice: what they leave out is neither judged nor counted, but it is still read where
    a replay or a distance between inputs needs it.  A phase that is left out explains nothing: what a divergence in it does
    to one that is judged is a finding there (differ.judges.left_out).
    `probe` is called with every judged record, for calibration.
    `noise`: twins of either side, whose distance from it is the noise floor.
    `progress` is called with the number of steps done and their total, before the first and after each.
    `reference`: both sides recomputed (differ.reference), which then decides on losses and gradients.
    `series` asks for what the drawn reports need (`DiffResult.series`); it never changes the verdict.
    """

    policy: Policy = field(default_factory=default_policy)
    rules: tuple[Rule, ...] = ()
    only: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    steps: tuple[int, int] | None = None
    phases: frozenset[Phase] | None = None
    probe: Callable[[Measurement], None] | None = None
    series: bool = False
    noise: tuple[str | os.PathLike[str], ...] = ()
    progress: Callable[[int, int], None] | None = None
    reference: References | None = None

    def wants_step(self, step: int) -> bool:
        """Whether a step is in the chosen range; step 0 only if the range says so."""
        return self.steps is None or self.steps[0] <= step <= self.steps[1]

    def wants_phase(self, phase: Phase) -> bool:
        """Whether findings of a phase are asked for."""
        return self.phases is None or phase in self.phases

    def wants_name(self, name: str) -> bool:
        """Whether a record of that canonical name is compared."""
        if self.only and not any(fnmatchcase(name, glob) for glob in self.only):
            return False
        return not any(fnmatchcase(name, glob) for glob in self.omit)

    @property
    def filters_names(self) -> bool:
        """Whether some names may be left out, so that counts need the index."""
        return bool(self.only or self.omit)
