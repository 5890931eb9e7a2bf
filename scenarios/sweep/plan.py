"""What a sweep runs: cells times seeds, each a task for a worker, from a TOML file, options, or both.

paths = ["torch", "mlx"]      # one or two
config = "run.toml"           # optional, beside this file
seeds = 15                    # 0 to 14, or a list
pass = "same"                 # or "loss<=2.5", "eval:NAME>=0.9"
share = true                  # two paths: b starts from a's adapters and trains on its batches
[set]                         # settings of every run
train.steps = 2
[baseline]                    # one path, pass = "same": what every cell is compared with
clip.mode = "none"
[grid]                        # all combinations
clip.value = [0.01, 0.1]
[[cells]]                     # or a list
clip.mode = "norm"
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scenarios.bisect.jobs import Job, code_digest, digest
from scenarios.config import load, parse, unflatten
from scenarios.paths import path_info
from scenarios.sweep.rule import Rule, parse_rule
from tracer.errors import BadConfig, BadUsage, NotFound

SEED: Final = "train.seed"
STEPS: Final = "train.steps"
KEYS: Final = ("paths", "config", "seeds", "pass", "share", "set", "baseline", "grid", "cells")
Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """One piece of work: a run, and for `same` the one that it is compared with.

    `cell` and `seed` say where its result belongs, `column` which path it judges ("" where two are compared).  `share`: the
    run takes adapters and batches from its reference.
    """

    cell: int
    seed: int
    column: str
    run: Job
    reference: Job | None
    share: bool
    rule: Rule

    def key(self, judged_by: str) -> str:
        """Digest of all that decides the result; `judged_by` stands for the tolerances."""
        reference = self.reference.key() if self.reference is not None else None
        return digest([self.run.key(), reference, self.share, str(self.rule), judged_by, code_digest("differ")])


@dataclass(frozen=True, slots=True)
class Plan:
    """A sweep.  `cells` are the settings that each adds to its path's `bases` (flat); `baseline` those of the reference."""

    paths: tuple[str, ...]
    bases: Mapping[str, Settings]
    cells: tuple[Settings, ...]
    seeds: tuple[int, ...]
    rule: Rule
    baseline: Settings
    share: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """What each cell has a rate for: the comparison, or each path by itself."""
        return ("",) if self.rule.compares else self.paths

    def tasks(self) -> list[Task]:
        """All tasks, a seed's cells after one another so that they find their common reference still there."""
        places = itertools.product(self.seeds, range(len(self.cells)), self.columns)
        return [self._task(cell, seed, column) for seed, cell, column in places]

    def _task(self, cell: int, seed: int, column: str) -> Task:
        changes = self.cells[cell]
        run = self._job(column or self.paths[-1], changes, seed)
        reference = None
        if self.rule.compares:
            reference = self._job(self.paths[0], changes if len(self.paths) > 1 else self.baseline, seed)
        return Task(cell, seed, column, run, reference, self.share, self.rule)

    def _job(self, path: str, changes: Settings, seed: int) -> Job:
        settings = {**self.bases[path], **changes, SEED: seed}
        return Job(int(settings[STEPS]), path, settings)

    def title(self, cell: int) -> str:
        """A cell's settings in words."""
        return ", ".join(f"{key} = {_shown(value)}" for key, value in self.cells[cell].items()) or "as configured"

    def against(self) -> str:
        """What a run must be the same as, or the rule."""
        if not self.rule.compares:
            return str(self.rule)
        if len(self.paths) > 1:
            return f"the same on {self.paths[0]} and {self.paths[1]}"
        changes = ", ".join(f"{key} = {_shown(value)}" for key, value in self.baseline.items())
        return f"the same as the baseline ({changes or 'as configured'})"


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line said; empty fields leave the plan file's."""

    paths: tuple[str, ...] = ()
    config: Path | None = None
    settings: tuple[str, ...] = ()
    grid: tuple[str, ...] = ()
    baseline: tuple[str, ...] = ()
    seeds: str = ""
    rule: str = ""
    share: bool = False


def make_plan(file: Path | None, asked: Asked) -> Plan:
    """The plan of a file with the command line's options over it.  Raises BadConfig, BadUsage or NotFound."""
    table = _read(file) if file is not None else {}
    paths = asked.paths or tuple(table.get("paths", ()))
    if not 1 <= len(paths) <= 2:
        raise BadUsage(f"{len(paths)} paths were given", "give one --path, or two to compare")
    for path in paths:
        path_info(path)
    rule = parse_rule(asked.rule or str(table.get("pass", "same")))
    share = asked.share or bool(table.get("share", False))
    baseline = _flat(table.get("baseline", {})) | _assigned(asked.baseline)
    _require(rule, paths, baseline, share=share)
    given = table.get("config")
    config = asked.config or (file.parent / str(given) if file is not None and given else None)
    given_all = _flat(table.get("set", {})) | _assigned(asked.settings)
    bases = {path: load(config, base=path_info(path).base).flat() | given_all for path in paths}
    cells = _cells(_flat(table.get("grid", {})) | _assigned(asked.grid), table.get("cells", []))
    seeds = _seeds(
        json.loads(asked.seeds) if asked.seeds.strip().startswith("[") else asked.seeds or table.get("seeds", 5)
    )
    plan = Plan(paths, bases, cells, seeds, rule, baseline, share)
    return _checked(plan)


def _require(rule: Rule, paths: Sequence[str], baseline: Settings, *, share: bool) -> None:
    if baseline and (len(paths) > 1 or not rule.compares):
        raise BadUsage("a baseline is for one path and pass = same", "leave it out, or give one path")
    if share and (len(paths) < 2 or not rule.compares):
        raise BadUsage("share needs two paths and pass = same", "leave it out, or give two paths")


def _checked(plan: Plan) -> Plan:
    """The plan with every value in its own type, so that a bad one is told before anything runs."""

    some = plan.bases[plan.paths[0]]

    def own(changes: Settings, of: str) -> Settings:
        flat = parse(unflatten({**some, **changes}), place=of).flat()
        return {key: flat[key] for key in changes}

    cells = tuple(own(changes, f"cell {number}") for number, changes in enumerate(plan.cells, start=1))
    bases = {path: parse(unflatten(base), place="sweep").flat() for path, base in plan.bases.items()}
    if any(SEED in changes for changes in (*cells, plan.baseline)):
        raise BadUsage(f"{SEED} is what a sweep repeats a cell with", "give --seeds")
    return Plan(plan.paths, bases, cells, plan.seeds, plan.rule, own(plan.baseline, "baseline"), plan.share)


def _cells(grid: Settings, listed: Any) -> tuple[Settings, ...]:
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise BadConfig(f"grid: {key} has no list of values", f"write {key} = [value, value]")
    combined = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    if not isinstance(listed, list):
        raise BadConfig("cells is not a list of tables", "write [[cells]] before each")
    cells = [*combined, *(_flat(cell) for cell in listed)]
    return tuple(cells) or ({},)


def _seeds(given: Any) -> tuple[int, ...]:
    try:
        seeds = tuple(int(seed) for seed in given) if isinstance(given, list) else tuple(range(int(given)))
    except (TypeError, ValueError):
        seeds = ()
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise BadUsage(f"seeds = {given} means nothing", "give a number of seeds, or a list as in [0, 3, 7]")
    return seeds


def _read(file: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{file} does not exist", "give the plan of a sweep (TOML), or options") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{file} is not a readable TOML file: {error}") from error
    for key in table:
        if key not in KEYS:
            raise BadConfig(f"{file}: {key} is not known", f"known are {', '.join(KEYS)}")
    return table


def _flat(table: Any, prefix: str = "") -> dict[str, Any]:
    """Nested tables (`clip.mode = …`) as dotted keys."""
    if not isinstance(table, Mapping):
        raise BadConfig(f"{prefix or 'a table of settings'} is not a table")
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _assigned(texts: Iterable[str]) -> dict[str, Any]:
    """`key=value` options; the value is TOML, a bare word counts as a string."""
    assigned: dict[str, Any] = {}
    for text in texts:
        key, equals, word = text.partition("=")
        if not equals or "." not in key:
            raise BadUsage(f"{text} cannot be read", "write section.key=value, or --grid section.key=[value, value]")
        try:
            assigned[key.strip()] = tomllib.loads(f"value = {word}")["value"]
        except tomllib.TOMLDecodeError:
            assigned[key.strip()] = word.strip()
    return assigned


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
