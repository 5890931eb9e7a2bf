"""Environments of a bisection over package pins: one for each list of pins, made by the user's own command.

The command is split as a shell would, `{pins}` becomes the file with the pins, one a line, and `{venv}` the folder to make;
no shell runs it.  An environment that cannot be made (pins that do not go together) leaves its choice without an answer; it is
tried once in a bisection, and again in the next one, since a registry that did not answer looks the same.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from scenarios.bisect.jobs import digest
from scenarios.bisect.store import Store
from tracer.errors import BadUsage, TraceError

_PINS: Final = "{pins}"
_VENV: Final = "{venv}"
_TAIL: Final = 8


class NoEnvironment(TraceError):
    """A list of pins that the command could not make an environment of."""

    slug = "no-environment"


@dataclass(slots=True)
class Environments:
    """Makes and remembers environments; `made` counts those made now, `seconds` is what they took."""

    store: Store
    made: int = 0
    seconds: float = 0.0
    _ready: dict[str, str] = field(default_factory=dict)
    _failed: dict[str, str] = field(default_factory=dict)

    def interpreter(self, pins: Sequence[str], make: str) -> str:
        """Path of the interpreter for these pins; raises NoEnvironment."""
        key = digest([list(pins), make])
        if key in self._failed:
            raise NoEnvironment(self._failed[key])
        if key not in self._ready:
            self._ready[key] = self._interpreter(key, pins, make)
        return self._ready[key]

    def _interpreter(self, key: str, pins: Sequence[str], make: str) -> str:
        folder = self.store.environment(key)
        known = self.store.read("envs", key)
        if known is None or known["error"] or not folder.is_dir():
            self.store.drop_environment(key)
            known = {"error": self._make(folder, pins, make), "pins": list(pins)}
            self.store.write("envs", key, known)
        if known["error"]:
            self._failed[key] = str(known["error"])
            raise NoEnvironment(self._failed[key])
        return str(python_of(folder))

    def _make(self, folder: Path, pins: Sequence[str], make: str) -> str:
        """Run the command; "" or why there is no environment."""
        began = time.monotonic()
        self.store.prepare("envs")
        listed = folder.with_name(f"{folder.name}.txt")
        listed.write_text("".join(f"{line}\n" for line in pins), "utf-8")
        command = [part.replace(_PINS, str(listed)).replace(_VENV, str(folder)) for part in split_command(make)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise BadUsage(
                f"--make: {command[0]} cannot be run: {error}", "give a command that is installed"
            ) from error
        self.made += 1
        self.seconds += time.monotonic() - began
        if done.returncode:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            return f"--make ended with exit code {done.returncode}: {' | '.join(said[-_TAIL:])}"
        return "" if python_of(folder).exists() else f"--make made no {python_of(folder)}"


def split_command(make: str) -> list[str]:
    """The command's parts; raises BadUsage where it does not say where the environment goes."""
    try:
        parts = shlex.split(make)
    except ValueError as error:
        raise BadUsage(f"--make cannot be read: {error}", "quote it as in a shell") from error
    for needed in (_PINS, _VENV):
        if not any(needed in part for part in parts):
            raise BadUsage(f"--make has no {needed}", "write --make 'make-env.sh {pins} {venv}'")
    return parts


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
