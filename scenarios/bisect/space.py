"""What may be changed between two runs, and the run that belongs to a choice of changes.

A change is a setting of the run configuration, a component of a training path (`--across`) or a package pin.  `job` takes
any subset of them from b and the rest from a: nothing chosen is a itself, everything chosen is b itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from scenarios.bisect.jobs import Job
from tracer.errors import BadConfig

PATH: Final = "path"
INIT: Final = "init"
BATCHES: Final = "batches"
STEPS: Final = "train.steps"
SCHEDULE: Final = "optimizer.schedule"
ABSENT: Final = "absent"
# Components of the MLX paths that can be taken from one another: section `parts` of the run configuration.
PARTS: Final = ("loader", "loss", "loop")
_MLX: Final = ("mlx", "mlx-lm", "unsloth-mlx")
# The hand-written loop loads and adapts with mlx-lm.
_LOADERS: Final = {"mlx": "mlx-lm"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Item:
    """One change: `a` and `b` are its values on the two sides; kind is `setting`, `component` or `pin`."""

    key: str
    a: Any
    b: Any
    kind: str = "setting"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two runs: a path and its settings, or a program; pins by package name, None for this environment."""

    path: str = ""
    settings: Mapping[str, Any] | None = None
    pins: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Space:
    """Two runs and what differs between them; both run under `python`, or under the interpreter that runs us."""

    a: Side
    b: Side
    program: tuple[str, ...] = ()
    make: str = ""
    what: str = ""
    python: str = ""

    def items(self) -> tuple[Item, ...]:
        """Everything that differs: components in causal order, then settings, then pins."""
        return (*self._components(), *self._settings(), *self._pins())

    @property
    def whole_runs(self) -> bool:
        """Whether a run must go to its end though only its first steps are recorded: its schedule depends on where that is."""
        return any(side.settings and side.settings[SCHEDULE] != "constant" for side in (self.a, self.b))

    def _components(self) -> list[Item]:
        if self.a.path == self.b.path:
            return []
        names = [f"parts.{part}" for part in PARTS] if self._hybrid else [PATH]
        values = {INIT: (f"as {self.a.path} draws", f"as {self.b.path} draws")}
        values[BATCHES] = (f"as {self.a.path} makes them", f"as {self.b.path} makes them")
        ordered = [names[0], INIT, BATCHES, *names[1:]] if self._hybrid else [INIT, BATCHES, PATH]
        items = [Item(key, *values.get(key, self._owners(key)), kind="component") for key in ordered]
        return [item for item in items if item.a != item.b]

    def _owners(self, key: str) -> tuple[str, str]:
        part = key.removeprefix("parts.")
        return self._owner(self.a, part), self._owner(self.b, part)

    def _owner(self, side: Side, part: str) -> str:
        """Whose component a side uses when nothing is moved."""
        chosen = (side.settings or {}).get(f"parts.{part}", "path")
        name = side.path if chosen == "path" else str(chosen)
        return _LOADERS.get(name, name) if part == "loader" else name

    @property
    def _hybrid(self) -> bool:
        """Whether the two paths can exchange components, and do not only stand for themselves."""
        return self.a.path in _MLX and self.b.path in _MLX

    def _settings(self) -> list[Item]:
        a, b = self.a.settings or {}, self.b.settings or {}
        moved = {f"parts.{part}" for part in PARTS} if self.a.path != self.b.path and self._hybrid else set()
        return [Item(key, a[key], b[key]) for key in a if key not in moved and a[key] != b[key]]

    def _pins(self) -> list[Item]:
        a, b = self.a.pins or {}, self.b.pins or {}
        names = sorted({*a, *b})
        return [
            Item(name, a.get(name, ABSENT), b.get(name, ABSENT), kind="pin")
            for name in names
            if a.get(name) != b.get(name)
        ]

    def job(self, chosen: Iterable[str], steps: int) -> Job:
        """The run with the chosen changes of b in a."""
        keys = frozenset(chosen)
        pins = self._chosen_pins(keys)
        make = self.make if pins is not None else ""
        if self.program:
            return Job(steps, program=self.program, pins=pins, make=make, what=self.what)
        path, settings, loader, loop = self._run(keys)
        everything = frozenset(item.key for item in self.items())
        sources: dict[str, Job | None] = {INIT: None, BATCHES: None}
        for name, own in ((INIT, loader), (BATCHES, loop)):
            wanted = "b" if name in keys else "a"
            # A source is one of the two whole runs, so that the number of runs does not grow with the choices.
            if self.a.path != self.b.path and wanted != own and any(i.key == name for i in self._components()):
                sources[name] = self.job(everything if wanted == "b" else (), steps)
        values = settings if self.whole_runs else {**settings, STEPS: steps}
        return Job(
            steps,
            path=path,
            settings=values,
            init_from=sources[INIT],
            batches_from=sources[BATCHES],
            pins=pins,
            make=make,
            what=self.what,
            python=self.python,
        )

    def _run(self, keys: frozenset[str]) -> tuple[str, dict[str, Any], str, str]:
        """Path, settings, and which side draws the adapters and makes the batches by itself."""
        a, b = self.a.settings or {}, self.b.settings or {}
        settings = {key: b[key] if key in keys and key in b else value for key, value in a.items()}
        if not self._hybrid or self.a.path == self.b.path:
            side = "b" if PATH in keys else "a"
            return (self.b if side == "b" else self.a).path, settings, side, side
        sides = {part: self._side_of(part, keys) for part in PARTS}
        owner = self.b if sides["loop"] == "b" else self.a
        if len(set(sides.values())) == 1:
            parts = {key: value for key, value in (owner.settings or {}).items() if key.startswith("parts.")}
            return owner.path, settings | parts, sides["loader"], sides["loop"]
        for part in PARTS:
            source = self.b if sides[part] == "b" else self.a
            own = (source.settings or {}).get(f"parts.{part}", "path") if source is owner else self._owner(source, part)
            settings[f"parts.{part}"] = own
        return owner.path, settings, sides["loader"], sides["loop"]

    def _side_of(self, part: str, keys: frozenset[str]) -> str:
        """Side that a component is of.  One that is the same on both (mlx and mlx-lm load alike) goes with the loop."""
        key = f"parts.{part}"
        owners = self._owners(key)
        return "b" if (key if owners[0] != owners[1] else "parts.loop") in keys else "a"

    def _chosen_pins(self, keys: frozenset[str]) -> tuple[str, ...] | None:
        if self.a.pins is None or self.b.pins is None:
            return None
        names = sorted({*self.a.pins, *self.b.pins})
        lines = [(self.b.pins if name in keys else self.a.pins).get(name) for name in names]
        return tuple(line for line in lines if line is not None)


def read_pins(text: str, place: str) -> dict[str, str]:
    """Package name (normalised as in PEP 503) -> its line, from a list such as `pip freeze` prints.

    Raises BadConfig for a line that names no package, or one that is named twice.
    """
    pins: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        match = _NAME.match(line)
        if match is None:
            raise BadConfig(f"{place}, line {number}: {line} names no package", "write name==version, one a line")
        name = re.sub(r"[-_.]+", "-", match.group()).lower()
        if name in pins:
            raise BadConfig(f"{place}, line {number}: {name} is there twice", "keep one of the two lines")
        pins[name] = line
    return pins


def shown(items: Sequence[Item]) -> str:
    """Keys in one line, as a progress line names them."""
    return items[0].key + (f" and {len(items) - 1} more" if len(items) > 1 else "") if items else "a"
