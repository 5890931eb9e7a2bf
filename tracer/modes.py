"""In which mode a model computes the losses that are differentiated: training or evaluation.

One word for a run, as of its first step, among what is observed; a step that departs from it says so itself, in a record that is
shown and never judged, since a mode changes nothing in a model without dropout or the like.  What a program evaluates in
between does not count: nothing of that is differentiated.  Imports no framework.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import numpy as np

from tracer.schema import REPORTED_PREFIX, Record

if TYPE_CHECKING:
    from tracer.recorder import Recorder

KEY: Final = "model.training"
# Some modules train and some do not, or some micro-batches of a step.
MIXED: Final = "mixed"
# Every module in training mode (True), none (False), or MIXED.
Mode = bool | str

_NUMBERS: Final[dict[Mode, float]] = {True: 1.0, False: 0.0, MIXED: 0.5}


def mode_of(flags: Iterable[Mode]) -> Mode | None:
    """The mode that several modules, or micro-batches, make together; None of none."""
    found = set(flags)
    return MIXED if len(found) > 1 else next(iter(found), None)


class TrainingMode:
    """The mode of the steps of one recording."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._first: Mode | None = None

    def of_step(self, modes: Iterable[Mode | None]) -> list[Record]:
        """Note the modes of a step's micro-batches (None: not seen).

        Returns the record `reported.model.training` (float64: 1 training, 0 evaluation, 0.5 some of both) of a step whose mode
        is another than that of the first; else nothing.
        """
        mode = mode_of(one for one in modes if one is not None)
        if mode is None:
            return []
        if self._first is None:
            self._first = mode
            self._recorder.observe(KEY, mode)
        if mode == self._first:
            return []
        return [Record(f"{REPORTED_PREFIX}{KEY}", np.asarray(_NUMBERS[mode], np.float64), "float64", (), KEY)]
