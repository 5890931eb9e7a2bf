"""Parameters that one side trains and its optimizer does not hold: a finding where their records go missing, and nothing later.

What such a parameter is after a step follows: what it was.  So do its gradients, which pile up where it is the optimizer that
clears them.  The rest of the model is judged as far as its inputs agree, like that of any other parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from differ.inputs import is_unheld
from differ.session import RowPair, Session
from tracer.names import split_state_name
from tracer.schema import Phase


def remember(session: Session, pair: RowPair, name: str, *, in_a: bool) -> None:
    """Look at a record that only one side has, in a phase that is judged."""
    if pair.phase not in (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM):
        return
    owner = split_state_name(name)[0] if pair.phase is Phase.OPT_STATE else name
    if is_unheld(session.b if in_a else session.a, pair.step, owner):
        session.unheld.add(owner)


def followed(session: Session, pair: RowPair, names: Sequence[str]) -> list[str]:
    """Those that are left to be judged; the others are counted as explained."""
    if not session.unheld:
        return list(names)
    left = [name for name in names if name not in session.unheld or not _follows(session, pair, name)]
    session.tally.explained(pair.phase, len(names) - len(left))
    return left


def _follows(session: Session, pair: RowPair, name: str) -> bool:
    return pair.phase is Phase.GRAD or any(is_unheld(rows, pair.step, name) for rows in (session.a, session.b))
