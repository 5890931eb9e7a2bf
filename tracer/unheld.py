"""What a trace says of trainable parameters that no optimizer holds: they get a gradient, and never an update.

Their number is always there, so that two runs can be compared in it; their names where there are any.  Imports no framework.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tracer.recorder import Recorder

COUNT: Final = "optimizer.unheld"
NAMES: Final = "optimizer.unheld.names"


def observe_unheld(recorder: Recorder, originals: Iterable[str]) -> None:
    """Observe the number of these parameters (the framework's own names), and their canonical names."""
    names = [recorder.names(original).name for original in originals]
    recorder.observe(COUNT, len(names))
    if names:
        recorder.observe(NAMES, names)
