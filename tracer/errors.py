"""The errors that a user can meet, as *what happened, what to do*.

Each has a slug (a heading in docs/errors.md), a hint and an exit code.  They are printed once, by the command
line's `main`, as one line; bad input never shows a traceback.
"""

from __future__ import annotations

from typing import ClassVar


class TraceError(Exception):
    """Base of all errors of this project.  `hint` says what to do about it."""

    slug: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(hint)  # a traceback, in a notebook for instance, shows it too

    def line(self) -> str:
        """The error as one line: message, hint, slug."""
        text = " ".join(str(self).split())
        hint = f"; {' '.join(self.hint.split())}" if self.hint else ""
        return f"{text}{hint} [{self.slug}]"


class NotFound(TraceError):
    """A path that does not exist, or is a folder."""

    slug = "not-found"


class NoPermission(TraceError):
    """A file that may not be read or written."""

    slug = "no-permission"


class NotATrace(TraceError):
    """A file that is not HDF5, or HDF5 without a trace in it."""

    slug = "not-a-trace"


class NewerFormat(TraceError):
    """A trace written by a later version than this one."""

    slug = "newer-format"


class Damaged(TraceError):
    """A trace whose bytes do not match its own digests, or that HDF5 cannot read any more."""

    slug = "damaged"


class Empty(TraceError):
    """A trace without a single committed step."""

    slug = "empty"


class MissingRank(TraceError):
    """A distributed run's traces of which one is not there, or that are not of one run."""

    slug = "missing-rank"


class BadUsage(TraceError):
    """Options that do not go together, or a value that means nothing."""

    slug = "usage"


class BadConfig(TraceError):
    """A run configuration, name map or policy file that cannot be used."""

    slug = "bad-config"


class NothingRecorded(TraceError):
    """A program that ended without one optimizer step having been seen."""

    slug = "nothing-recorded"


class RecordingStopped(TraceError):
    """Recording ended before the run did; the run itself went on."""

    slug = "recording-stopped"


class PathUnavailable(TraceError):
    """A training path whose libraries are not installed, or do not work here."""

    slug = "path-unavailable"


class PackageMissing(TraceError):
    """An optional package that what was asked for needs."""

    slug = "package-missing"
