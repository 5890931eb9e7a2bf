"""Open a file that may be anything, and turn whatever HDF5 says about damaged bytes into one error of ours."""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import h5py

from tracer.errors import BadUsage, Damaged, NoPermission, NotATrace, NotFound, TraceError
from tracer.place import rank_files, ranks_in

SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
# What to do about damage.
RERECORD: Final = "`trace check` says what is left; record it again"


@contextlib.contextmanager
def damage(path: Path, what: str) -> Iterator[None]:
    """Anything that HDF5, numpy or the decoder throws at damaged bytes becomes Damaged."""
    try:
        yield
    except TraceError:
        raise
    except MemoryError as error:
        raise Damaged(f"{path} is damaged: {what} (it asks for more memory than there is)", RERECORD) from error
    except Exception as error:
        raise Damaged(f"{path} is damaged: {what} ({_first_line(error)})", RERECORD) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def find_ranks(path: Path) -> tuple[Path, dict[int, Path]] | None:
    """The run's name and its ranks' files, if `path` stands for them; None if it is to be opened as a file.

    Raises NotFound (a folder or pattern without any) and BadUsage (several runs).
    """
    # os.path: it says no where Path raises (a folder that may not be searched, a name that is too long).
    if os.path.isdir(path):
        runs = ranks_in(path)
        if not runs:
            raise NotFound(f"{path} is a folder without traces of ranks", "give the name of a file")
        return _one_run(path, runs)
    if os.path.exists(path):
        return None
    if any(sign in path.name for sign in "*?["):
        matching = {
            run: files
            for run, files in ranks_in(path.parent).items()
            if any(fnmatch.fnmatchcase(file.name, path.name) for file in files.values())
        }
        if not matching:
            raise NotFound(
                f"{path} matches no trace of a rank", "traces of ranks are named run.rank0.h5, run.rank1.h5 …"
            )
        return _one_run(path, matching)
    files = rank_files(path)
    return (path, files) if files else None


def _one_run(path: Path, runs: Mapping[Path, dict[int, Path]]) -> tuple[Path, dict[int, Path]]:
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        raise BadUsage(f"{path} holds the ranks of several runs: {names}", f"name one: {min(runs)}")
    return next(iter(runs.items()))


def check_readable(path: Path) -> None:
    """Raise NotFound or NoPermission unless the file can be read."""
    try:
        path.open("rb").close()
    except IsADirectoryError as error:
        raise NotFound(f"{path} is a folder, not a trace", "give the name of a file") from error
    except FileNotFoundError as error:
        raise NotFound(f"{path} does not exist", "check the name, or record it with `trace record`") from error
    except PermissionError as error:
        raise NoPermission(f"{path} may not be read", "mend its permissions (chmod u+r)") from error
    except OSError as error:
        raise NotFound(f"{path} cannot be opened: {error.strerror or error}", "check the name") from error


def being_written(fd: int) -> bool | None:
    """Whether a recorder has the file open for writing; None where the file system knows no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def open_hdf5(path: Path, fd: int) -> Any:
    """The h5py file; raises NotATrace or Damaged.  `fd`: the same file, open for reading."""
    if os.pread(fd, len(SIGNATURE), 0) != SIGNATURE:
        raise NotATrace(f"{path} is not an HDF5 file", "give a file that `trace record` wrote")
    with damage(path, "HDF5 cannot open it"):
        # No lock: a run that is still being recorded can be looked at, and the seals say if what was read is whole.
        return h5py.File(path, "r", locking=False, rdcc_nbytes=0)
