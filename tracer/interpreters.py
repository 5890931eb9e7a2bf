"""Run this very project under the interpreter of another environment: other libraries, other versions, one `trace`.

The packages are lent, not installed: a folder of links to them goes to the front of PYTHONPATH, and to nothing else of this
environment.  What the other one must have itself is asked before anything runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from tracer.errors import BadUsage, NotFound

LENT: Final = ("tracer", "differ", "scenarios")
# What the recorder itself imports.
NEEDED: Final = ("click", "h5py", "numpy", "rich", "xxhash")
OLDEST: Final = (3, 11)
_PROBE: Final = (
    "import importlib.util, json, sys; "
    "print(json.dumps([sys.version_info[:2], [n for n in sys.argv[1:] if importlib.util.find_spec(n) is None]]))"
)


def find(python: str | os.PathLike[str]) -> Path:
    """The interpreter as an absolute path, links kept: a virtual environment is known by its link.  Raises NotFound."""
    found = shutil.which(os.fspath(python))
    if found is None:
        raise NotFound(
            f"{os.fspath(python)} is not an interpreter", "give the path of a python, as in .venv/bin/python"
        )
    return Path(found).absolute()


@contextlib.contextmanager
def lent(python: str | os.PathLike[str] | None) -> Iterator[Mapping[str, str]]:
    """What to add to the environment of a process of `python`, so that it can import this project.

    Nothing for the interpreter that runs us, or None.  Raises NotFound, or BadUsage with what is missing there and the
    command that installs it.
    """
    if python is None or os.fspath(python) == sys.executable:
        yield {}
        return
    interpreter = find(python)
    _check(interpreter)
    with tempfile.TemporaryDirectory(prefix="steptrace-") as folder:
        here = Path(__file__).resolve().parent.parent
        for package in LENT:
            if (here / package).is_dir():
                _link(here / package, Path(folder, package))
        yield {"PYTHONPATH": os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:  # a file system without links
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))


def _check(python: Path) -> None:
    try:
        done = subprocess.run([python, "-c", _PROBE, *NEEDED], capture_output=True, text=True)
    except OSError as error:
        raise BadUsage(f"{python} does not run: {error.strerror}", "give the path of a Python interpreter") from error
    try:
        version, missing = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BadUsage(f"{python} does not run: {said}", "give the path of a Python interpreter") from None
    if tuple(version) < OLDEST:
        found, least = (".".join(map(str, v)) for v in (version, OLDEST))
        raise BadUsage(f"{python} is Python {found}", f"the recorder needs {least} or later")
    if missing:
        raise BadUsage(
            f"{python} has no {', '.join(missing)}, which the recorder needs",
            f"{python} -m pip install {' '.join(missing)}",
        )
