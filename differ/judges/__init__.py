"""Judges: one per phase, each given the records of a row pair whose bits differ.

A judge counts every record that it is given exactly once (within, repeated, propagated, left out, or diverged with a
finding).  A new phase is one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from differ.judges.clip import judge_clip
from differ.judges.exact import judge_batch, judge_hparams, judge_init
from differ.judges.model import judge_model
from differ.judges.optimizer import judge_opt_state, judge_param
from differ.session import RowPair, Session
from tracer.schema import Phase

Judge = Callable[[Session, RowPair, Sequence[str]], None]

JUDGES: Final[Mapping[Phase, Judge]] = {
    Phase.INIT: judge_init,
    Phase.HPARAMS: judge_hparams,
    Phase.BATCH: judge_batch,
    Phase.FORWARD: judge_model,
    Phase.LOSS: judge_model,
    Phase.GRAD: judge_model,
    Phase.CLIPPED_GRAD: judge_clip,
    Phase.OPT_STATE: judge_opt_state,
    Phase.PARAM: judge_param,
    Phase.EVAL: judge_model,
}
