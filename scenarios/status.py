"""One line of status on a terminal, replaced as the work goes on and erased at its end; nothing anywhere else."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_DUMB: Final = ("dumb", "unknown")


@contextmanager
def status(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A function that shows a line on standard error with the time since the start."""
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") in _DUMB:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.status import Status

    began = time.monotonic()
    console = Console(stderr=True)
    with Status("", console=console) as shown:
        yield lambda text: shown.update(f"trace: {text}, {clock(time.monotonic() - began)}".replace("[", r"\["))


def clock(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `1 h 02 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
