"""Gates: programs whose traces must stay as their baselines are, from `[tool.trace.gate.NAME]` of pyproject.toml.

    [tool.trace.gate.lora]
    command = ["python", "train.py"]     # or: path = "mlx-lm", config = "run.toml", set = ["optimizer.lr=1e-4"]
    baseline = "traces/lora.h5"
    policy = "policy.toml"               # optional: tolerances
    noise = ["traces/lora.twin.h5"]      # optional: twins of the baseline, the noise floor
    steps = "1:5"                        # optional: steps to record and to compare
    what = "loss,grad,param"             # optional: phases to record
    fingerprint = true                   # optional: the baseline holds sketches, small enough for git

Files are relative to the folder of the pyproject.toml, and the program runs there.  A gate records in a process of its own,
so that it tests what a user would run.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from differ.options import DiffOptions
from differ.policy import default_policy, load_policy
from tracer.errors import BadConfig, NoPermission, NotFound, TraceError

FIELDS: Final = ("command", "path", "config", "set", "baseline", "policy", "noise", "steps", "what", "fingerprint")
# Lines of a failed program's output that an error shows.
_TAIL: Final = 12


class ProgramFailed(TraceError):
    """A gate's program that ended with an error, so that there is nothing to compare."""

    slug = "program-failed"


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate.  `program` are the arguments of `trace record` that say what runs; paths are absolute."""

    name: str
    program: tuple[str, ...]
    baseline: Path
    folder: Path
    policy: Path | None = None
    noise: tuple[Path, ...] = ()
    steps: tuple[int, int] | None = None
    what: str = ""
    fingerprint: bool | None = None

    def options(self, *, series: bool = False) -> DiffOptions:
        """How this gate's traces are compared."""
        policy = default_policy() if self.policy is None else load_policy(self.policy)
        return DiffOptions(policy=policy, noise=self.noise, steps=self.steps, series=series)

    def require_baseline(self) -> None:
        """Raise NotFound, with the command that makes it, if there is no baseline."""
        if not self.baseline.is_file():
            raise NotFound(
                f"gate {self.name} has no baseline: {self.baseline} does not exist",
                f"make it with `trace gate --update {self.name}`, look at it and commit it",
            )


def find_project(start: Path) -> Path:
    """The nearest pyproject.toml from a folder upwards; raises NotFound."""
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "pyproject.toml").is_file():
            return folder / "pyproject.toml"
    raise NotFound("there is no pyproject.toml here or above", "give one with --project")


def load_gates(project: Path) -> dict[str, Gate]:
    """All gates of a pyproject.toml, in its order.  Raises NotFound, NoPermission, BadConfig."""
    try:
        document = tomllib.loads(project.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise NoPermission(f"{project} may not be read", "mend its permissions (chmod u+r)") from error
    except OSError as error:
        raise NotFound(f"{project} cannot be opened: {error.strerror or error}", "check the name") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{project} is not TOML: {error}") from error
    table: Any = document
    for key in ("tool", "trace", "gate"):
        table = table.get(key, {}) if isinstance(table, dict) else {}
    if not isinstance(table, dict) or not table:
        raise BadConfig(f"{project} has no gates", "write [tool.trace.gate.NAME] with command and baseline")
    gates = {name: _gate(name, entry, project) for name, entry in table.items()}
    _require_own_baselines(gates, project)
    return gates


def _require_own_baselines(gates: Mapping[str, Gate], project: Path) -> None:
    owners: dict[Path, str] = {}
    for gate in gates.values():
        other = owners.setdefault(gate.baseline.resolve(), gate.name)
        if other != gate.name:
            raise BadConfig(f"{project}: gates {other} and {gate.name} have the same baseline", "give each its own")


def _gate(name: str, entry: Any, project: Path) -> Gate:
    where = f"{project}: [tool.trace.gate.{name}]"
    if not isinstance(entry, dict):
        raise BadConfig(f"{where} is not a table")
    for key in entry:
        if key not in FIELDS:
            raise BadConfig(f"{where}: unknown setting {key!r}", f"use {', '.join(FIELDS)}")
    folder = project.resolve().parent
    if "baseline" not in entry:
        raise BadConfig(f"{where} names no baseline", 'write baseline = "traces/NAME.h5"')
    policy = _text(entry, "policy", where)
    fingerprint = entry.get("fingerprint")
    if fingerprint is not None and not isinstance(fingerprint, bool):
        raise BadConfig(f"{where}: fingerprint must be true or false, not {fingerprint!r}")
    return Gate(
        name=name,
        program=_program(entry, where),
        baseline=folder / _text(entry, "baseline", where),
        folder=folder,
        policy=folder / policy if policy else None,
        noise=tuple(folder / file for file in _texts(entry, "noise", where, least=0)),
        steps=_steps(entry.get("steps"), where),
        what=_text(entry, "what", where),
        fingerprint=fingerprint,
    )


def _program(entry: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if ("command" in entry) == ("path" in entry):
        raise BadConfig(f"{where} needs either command or path", 'write command = ["python", "train.py"]')
    if "command" in entry:
        extra = [key for key in ("config", "set") if key in entry]
        if extra:
            raise BadConfig(f"{where}: {extra[0]} goes with path, not with command")
        return ("--", *_texts(entry, "command", where))
    config = _text(entry, "config", where)
    settings = [part for setting in _texts(entry, "set", where, least=0) for part in ("--set", setting)]
    return ("--path", _text(entry, "path", where), *(("--config", config) if config else ()), *settings)


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key, "")
    if not isinstance(value, str) or (key in entry and not value):
        raise BadConfig(f"{where}: {key} must be text, not {value!r}")
    return value


def _texts(entry: Mapping[str, Any], key: str, where: str, *, least: int = 1) -> list[str]:
    value = entry.get(key, [])
    if not isinstance(value, list) or len(value) < least or not all(isinstance(part, str) for part in value):
        raise BadConfig(f"{where}: {key} must be a list of texts, not {value!r}")
    return value


def _steps(value: Any, where: str) -> tuple[int, int] | None:
    """`3`, `"3"`, `"1:5"`, `":5"`, `"2:"` as the first and the last step."""
    if value is None:
        return None
    low, colon, high = str(value).partition(":")
    try:
        first = int(low) if low else 0
        last = int(high) if high else (sys.maxsize if colon else first)
    except ValueError as error:
        raise BadConfig(f"{where}: steps {value!r} is not a step or a range", 'write "1:5"') from error
    if isinstance(value, bool) or first < 0 or last < first:
        raise BadConfig(f"{where}: steps {value!r} holds no step", 'write "1:5"')
    return first, last


def record(gate: Gate, output: Path, log: Path) -> None:
    """Record a gate's program into `output`, with all that it prints in `log`.  Raises ProgramFailed."""
    command = [sys.executable, "-m", "tracer", "record", "--force", "-o", str(output), *_narrowing(gate), *gate.program]
    with log.open("wb") as file:
        code = subprocess.run(command, cwd=gate.folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code != 0:
        lines = log.read_text("utf-8", errors="replace").splitlines()
        said = _last_words([line for line in lines if line.strip()], code)
        raise ProgramFailed(
            f"gate {gate.name}: its program ended with exit code {code}: {said}", "run it by itself first"
        )


def _narrowing(gate: Gate) -> list[str]:
    options = (
        []
        if gate.steps is None
        else ["--steps", f"{gate.steps[0]}:{'' if gate.steps[1] == sys.maxsize else gate.steps[1]}"]
    )
    return options + (["--what", gate.what] if gate.what else [])


def _last_words(lines: Sequence[str], code: int) -> str:
    """The recorder's own error where the exit code is the recorder's, else the end of what the program printed."""
    own = [line.removeprefix("trace: ") for line in lines if line.startswith("trace: ")]
    theirs = [line for line in lines if not line.startswith("trace: ")]
    if own and (code == 2 or not theirs):
        return own[-1]
    return " | ".join(theirs[-_TAIL:]) or "it printed nothing"
