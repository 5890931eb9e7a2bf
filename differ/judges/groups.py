"""Which group a parameter is in: two optimizers with the same groups may have dealt the parameters out to them differently.

The records of `hparams` are the groups' settings, so they agree; each side's update follows from its own group, so the replay
agrees too.  What decides is the settings that apply to a parameter: looked at once, where both sides have the same groups and
say who is in them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Final

from differ.replay.gather import hyper_of, members
from differ.replay.rules.base import Hyper
from differ.result import Finding, Kind
from differ.session import RowPair, Session

MEMBERS: Final = "optimizer.groups"
_NUMBERS: Final = tuple(field.name for field in fields(Hyper) if field.name not in ("step", "more"))


def judge_groups(session: Session, pair: RowPair) -> None:
    """A finding for every parameter to which the two sides apply different settings of groups that are the same."""
    listed = [rows.trace.observed.get(MEMBERS) for rows in (session.a, session.b)]
    if listed[0] == listed[1] or not all(isinstance(groups, dict) for groups in listed):
        return
    # Not under the phase: what is remembered there is a divergence.
    if not session.first_time(MEMBERS) or not _same_groups(pair):
        return
    a, b = (members(rows) for rows in (session.a, session.b))
    for name in sorted(a.keys() & b.keys()):
        if session.options.wants_name(name):
            _judge(session, pair, name)


def _same_groups(pair: RowPair) -> bool:
    """Whether both sides have the same groups with the same settings; where they have not, those are findings."""
    if pair.a.positions.keys() != pair.b.positions.keys():
        return False
    return all(pair.a.digest(name) == pair.b.digest(name) for name in pair.a.positions)


def _judge(session: Session, pair: RowPair, name: str) -> None:
    settings = [hyper_of(rows, pair.step, name) for rows in (session.a, session.b)]
    a, b = settings
    if a is None or b is None:
        return
    apart = differing(a, b)
    if not apart:
        return
    words = [", ".join(f"{key} {value:g}" for key, value in side) for side in zip(*apart, strict=True)]
    session.block_step(pair.phase)
    session.first_time(pair.phase, MEMBERS)
    session.tally.find(
        Finding(
            pair.step, pair.phase.label, name, Kind.STATE, a=words[0], b=words[1],
            detail="in another group of the optimizer",
        )
    )  # fmt: skip


def differing(a: Hyper, b: Hyper) -> list[tuple[tuple[str, float], tuple[str, float]]]:
    """The settings of two groups that differ, each as (name, value) of either."""
    pairs = [(key, float(getattr(a, key)), float(getattr(b, key))) for key in _NUMBERS]
    return [((key, x), (key, y)) for key, x, y in pairs if x != y and not (x != x and y != y)]
