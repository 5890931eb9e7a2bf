"""The terminal that a command talks to: columns, colour and a progress bar.

Colour and progress are for a real terminal only: a pipe, a file, `TERM=dumb` and a CI log get neither, whatever `FORCE_COLOR`
says; `NO_COLOR` takes the colour from both.  Rich is imported when the first of them is shown, so that a pipe never pays
for it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TextIO

from differ.reporters import Style

if TYPE_CHECKING:
    from rich.progress import Progress

# Called with how many units of work are done, and of how many.
Report = Callable[[int, int], None]

# A comparison that takes no longer than this shows no bar, seconds.
PATIENCE: Final = 1.0
_FALLBACK: Final = (100, 24)
_DUMB: Final = ("dumb", "unknown")


def style() -> Style:
    """How a report on standard output may look."""
    colour = _is_terminal(sys.stdout) and not os.environ.get("NO_COLOR")
    return Style(width=shutil.get_terminal_size(_FALLBACK).columns, colour=colour)


@contextmanager
def progress(what: str, *, quiet: bool = False, unit: str = "step") -> Iterator[Report | None]:
    """A progress bar on standard error while the block runs, erased at its end; None where nobody would see it."""
    if quiet or not _is_terminal(sys.stderr):
        yield None
        return
    with _Bar(what, unit) as bar:
        yield bar.report


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") not in _DUMB


class _Bar:
    """A bar that appears when the work has taken longer than PATIENCE."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._began = time.monotonic()
        self._progress: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def report(self, done: int, total: int) -> None:
        """So many are done, of so many."""
        if self._progress is None and time.monotonic() - self._began < PATIENCE:
            return
        if self._progress is None:
            self._progress = _shown(self._unit)
            self._task = self._progress.add_task(self._what, total=total)
        self._progress.update(self._task, completed=done, total=total)


def _shown(unit: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(f"trace: {{task.description}}, {unit}", markup=False),
        MofNCompleteColumn(separator=" of "),
        BarColumn(),
        TimeRemainingColumn(compact=True),
    )
    # The streams stay as they are: what is printed meanwhile, if anything, is not ours to move about.
    progress = Progress(
        *columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    )
    progress.start()
    return progress
