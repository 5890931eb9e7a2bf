"""Choose among the causes that finders claim: each finding gets the one that explains it best.

    better   the larger explained share, to three digits; among equals the finder that is registered first

A cause is about the records that it names, at its step and in its phase.  A cause that explains none of the findings is
dropped; so is one that explains less than 0.99.  Settings that differ are never judged and always stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from differ.causes.config_differs import ID as SETTINGS
from differ.causes.fit import SHOWN
from differ.result import Cause, Finding
from tracer.names import split_state_name
from tracer.schema import Phase

# Shares that agree to this many digits are equally good.
DIGITS: Final = 3


def choose(claims: Sequence[Cause], findings: Sequence[Finding]) -> tuple[Cause, ...]:
    """The causes to show, in causal order, settings last; `claims` are in order of registration."""
    sound = [claim for claim in claims if claim.explains is None or claim.explains >= SHOWN]
    chosen: dict[int, None] = {}
    for finding in findings:
        fitting = [i for i, claim in enumerate(sound) if claim.id != SETTINGS and covers(claim, finding)]
        if fitting:
            chosen[min(fitting, key=lambda i: (-_rounded(sound[i]), i))] = None
    causes = [sound[i] for i in sorted(chosen, key=lambda i: (_when(sound[i]), i))]
    return (*causes, *(claim for claim in claims if claim.id == SETTINGS))


def covers(cause: Cause, finding: Finding) -> bool:
    """Whether a cause is about a finding.  A finding without a name is about a whole row."""
    if (cause.step, cause.phase) != (finding.step, finding.phase):
        return False
    if finding.name is None or finding.name in cause.names:
        return True
    return finding.phase == Phase.OPT_STATE.label and split_state_name(finding.name)[0] in cause.names


def _rounded(cause: Cause) -> float:
    return -1.0 if cause.explains is None else round(cause.explains, DIGITS)


def _when(cause: Cause) -> tuple[int, int]:
    return (cause.step or 0, Phase.parse(cause.phase) if cause.phase else Phase.CONFIG)
