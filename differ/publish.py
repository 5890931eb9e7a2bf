"""Put reports where they were asked for: files, and the places that a GitHub runner names.

A file is written whole or not at all: to a temporary one beside it, then renamed.  A trace is never overwritten.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from click.shell_completion import CompletionItem

from differ.reporters import FILES, Style, draws_series, reporter
from differ.result import DiffResult
from tracer.errors import BadUsage, NoPermission, NotFound

# Columns of a text report in a file.
FILE_WIDTH: Final = 100
_HDF5: Final = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True, slots=True)
class Destination:
    """A report of a kind, and the file that it goes to."""

    kind: str
    path: Path


class DestinationType(click.ParamType[Any]):
    """`html=out.html`."""

    name = "kind=file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Destination:
        """Kind and file."""
        if isinstance(value, Destination):
            return value
        kind, equals, path = str(value).partition("=")
        if not equals or not path or kind not in FILES:
            self.fail(f"{value!r} is not KIND=FILE with a kind of {', '.join(FILES)}", param, ctx)
        return Destination(kind, Path(path))

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - the signature is click's
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Kinds, until one is written."""
        return [CompletionItem(f"{kind}=") for kind in FILES if f"{kind}=".startswith(incomplete)]


def check(destinations: Iterable[Destination], traces: Iterable[Path]) -> None:
    """Refuse before the comparison what could not be written after it.  Raises BadUsage, NotFound, NoPermission."""
    taken = {trace.resolve() for trace in traces}
    for destination in destinations:
        path = destination.path
        if path.resolve() in taken:
            raise BadUsage(
                f"--report {destination.kind}={path} would overwrite a file of this comparison", "choose another"
            )
        taken.add(path.resolve())
        if path.is_dir():
            raise BadUsage(f"--report {destination.kind}={path}: that is a folder", "name a file in it")
        if not path.parent.is_dir():
            raise NotFound(f"{path.parent} does not exist", "make the folder for the report first")
        if _is_trace(path):
            raise BadUsage(f"--report {destination.kind}={path} would overwrite an HDF5 file", "choose another name")
        draws_series(destination.kind)  # loads it: a package that it needs may be missing


def _is_trace(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(_HDF5)) == _HDF5
    return False


def write_reports(result: DiffResult, destinations: Iterable[Destination]) -> Iterator[str]:
    """Write each report; yields `wrote out.html (52 kB)`.  Raises NoPermission or NotFound."""
    for destination in destinations:
        text = reporter(destination.kind)(result, Style(width=FILE_WIDTH))
        data = text.encode("utf-8", errors="replace")
        try:
            write_whole(destination.path, data)
        except PermissionError as error:
            raise NoPermission(f"{destination.path} may not be written", "choose another folder") from error
        except OSError as error:
            raise NotFound(f"{destination.path} cannot be written: {error.strerror or error}") from error
        yield f"wrote {destination.path} ({max(1, round(len(data) / 1000)):,} kB)"


def publish_github(result: DiffResult) -> None:
    """Job summary and step outputs, where the runner asks for them.  Raises NotFound if it names a file that is none."""
    from differ.reporters import github

    try:
        github.publish(result, os.environ)
    except OSError as error:
        raise NotFound(f"the job summary or the step outputs cannot be written: {error}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file by `data`, or leave it as it was.  Raises OSError."""
    target = path.resolve()
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        path.write_bytes(data)  # a pipe or a device has no half file to be left behind
        return
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o666 & ~_umask()
    import tempfile

    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, mode)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
