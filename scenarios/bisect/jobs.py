"""One run of a bisection as data, and the key that it is cached under.

The key covers all that decides a run: path or program, settings, what it takes from other runs, steps, pins or versions
of the installed packages, and the contents of the files that the settings name.  Two runs with one key are the same run.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from scenarios.paths import PATHS
from tracer._version import VERSION
from tracer.errors import BadUsage

# Settings that name a file or a folder.
_FILES: Final = ("data.source", "model.name")
_LIST: Final = (
    "import importlib.metadata as m, json, sys; "
    "print(json.dumps({'python': sys.version, **{d.metadata['Name']: d.version for d in m.distributions()}}))"
)
_PACKAGES: Final = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of which the first `steps` optimizer steps are recorded.

    Either `program` (argv after the interpreter) or `path` with `settings` (dotted keys).  `init_from` and `batches_from`
    are other runs.  `pins` are the requirement lines of its environment, None for one that is there: this one, or that of the
    interpreter `python`; `make` is the command that makes one.
    `repeat` numbers further runs of the same thing.
    """

    steps: int
    path: str = ""
    settings: Mapping[str, Any] | None = None
    program: tuple[str, ...] = ()
    init_from: Job | None = None
    batches_from: Job | None = None
    pins: tuple[str, ...] | None = None
    make: str = ""
    python: str = ""
    what: str = ""
    repeat: int = 0

    def content(self) -> dict[str, Any]:
        """All that decides the run, JSON-able."""
        return {
            "steps": self.steps,
            "path": self.path,
            "settings": dict(self.settings or {}),
            "program": list(self.program),
            "files": _digests(self._files()),
            "init_from": self.init_from.key() if self.init_from is not None else None,
            "batches_from": self.batches_from.key() if self.batches_from is not None else None,
            "pins": list(self.pins) if self.pins is not None else None,
            "make": self.make,
            "what": self.what,
            "repeat": self.repeat,
            "versions": self._versions(),
            "code": code_digest("tracer", "scenarios"),
        }

    def key(self) -> str:
        """Digest of `content`."""
        return digest(self.content())

    def again(self) -> Job:
        """The same run once more, under a key of its own."""
        return replace(self, repeat=self.repeat + 1)

    def _versions(self) -> Mapping[str, str]:
        if self.pins is not None:
            return {"python": platform.python_version()}
        return installed(self.python) if self.python else versions(self.path)

    def _files(self) -> Iterable[str]:
        named = [str((self.settings or {}).get(key, "")) for key in _FILES]
        return [name for name in (*named, *self.program) if name and Path(name).exists()]


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, its first 20 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def versions(path: str) -> dict[str, str]:
    """Versions of this tool, of Python and of the packages that a path needs; imports none of them."""
    found = {"steptrace": VERSION, "python": f"{sys.implementation.name} {platform.python_version()}"}
    for name in PATHS[path].needs if path in PATHS else ():
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@functools.cache
def installed(python: str) -> dict[str, str]:
    """All packages of another interpreter and their versions.  Raises BadUsage if it does not run."""
    try:
        done = subprocess.run([python, "-c", _LIST], capture_output=True, text=True, check=True)
        return {"interpreter": python, **json.loads(done.stdout.splitlines()[-1])}
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as error:
        raise BadUsage(f"{python} does not run: {error}", "give the path of a Python interpreter") from error


@functools.cache
def code_digest(*packages: str) -> str:
    """Digest of the source files of our own packages: a checkout changes without its version doing so."""
    files = sorted(file for name in packages for file in (_PACKAGES / name).rglob("*.py"))
    return digest([[str(file.relative_to(_PACKAGES)), hashlib.sha256(file.read_bytes()).hexdigest()] for file in files])


def _digests(names: Iterable[str]) -> dict[str, str]:
    return {name: _file_digest(Path(name)) for name in names}


def _file_digest(path: Path) -> str:
    """A file by its bytes; a folder by the names, sizes and times of its files, which may be gigabytes of weights."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    stats = [(str(file.relative_to(path)), file.stat()) for file in sorted(path.rglob("*")) if file.is_file()]
    return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
