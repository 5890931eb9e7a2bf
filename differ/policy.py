"""Tolerances: the checked-in defaults (`defaults.toml`, which documents its own fields) and a user's policy file.

A policy answers one question, what a record of this phase, dtype and name may differ by, and never looks at a tensor.
A user's entry may loosen or tighten anything; the last matching `[[rule]]` wins over the tables.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from tracer.dtypes import EPSILON
from tracer.errors import BadConfig, NoPermission, NotFound
from tracer.schema import Phase

DEFAULTS: Final = Path(__file__).with_name("defaults.toml")

_FIELDS: Final = ("base", "per_input", "bound")
_REPLAY_FIELDS: Final = ("ulp", "relative", "spike")
_NOISE_FIELDS: Final = ("safety", "safety_half", "reach", "quantile")
_RULE_FIELDS: Final = ("name", "phase", "dtype", *_FIELDS)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What a record may differ by: `base` + `per_input` * distance of the inputs, judged up to the distance `bound`.

    `explicit` marks a user's rule for this record: it then also decides where a replay would.
    """

    base: float
    per_input: float = 0.0
    bound: float = math.inf
    explicit: bool = False

    def at(self, distance: float) -> float:
        """Allowed relative L2 error at a distance between the two sides' inputs."""
        return self.base + self.per_input * distance

    def judges(self, distance: float) -> bool:
        """Whether a difference at that distance says anything: beyond, the inputs explain it."""
        return distance <= self.bound and self.at(distance) < 1.0


@dataclass(frozen=True, slots=True)
class ReplayTolerance:
    """What a recorded output may miss its replay by; `eps` is the dtype's distance from 1 to the next number."""

    ulp: float
    relative: float
    spike: float
    eps: float


@dataclass(frozen=True, slots=True)
class NoisePolicy:
    """How noise files are used: `safety` times their envelope is allowed (`safety_half` in 16-bit floats), `reach` times the
    distance of their inputs is covered, `quantile` of a family stands for each of its names.
    """

    safety: float = 1.0
    safety_half: float = 1.0
    reach: float = 1.0
    quantile: float = 1.0

    def factor(self, dtype: str) -> float:
        """Safety factor of a dtype."""
        return self.safety_half if dtype in ("float16", "bfloat16") else self.safety


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """A user's override: globs on name, phase and dtype, and the fields that it sets."""

    name: str
    phase: str
    dtype: str
    fields: tuple[tuple[str, float], ...]

    def matches(self, phase: Phase, dtype: str, name: str) -> bool:
        """Whether this rule is about a record."""
        return fnmatchcase(phase.label, self.phase) and fnmatchcase(dtype, self.dtype) and fnmatchcase(name, self.name)


@dataclass(frozen=True, slots=True)
class Policy:
    """All tolerances of one comparison; `file` is the user's policy file, empty for the defaults."""

    tables: Mapping[tuple[str, str], Tolerance]
    replays: Mapping[str, ReplayTolerance]
    exact: Mapping[str, float]
    rules: tuple[PolicyRule, ...] = ()
    file: str = ""
    noise: NoisePolicy = NoisePolicy()
    # A constant ratio of all gradients up to this far from 1 is a note, see `differ.judges.systematic`.
    systematic: float = 0.0

    def tolerance(self, phase: Phase, dtype: str, name: str) -> Tolerance:
        """Tolerance of a record.  A phase without a table of its own (hparams, batch) is exact unless a rule says not."""
        tolerance = self.tables.get((phase.label, dtype), Tolerance(0.0))
        for rule in self.rules:
            if rule.matches(phase, dtype, name):
                tolerance = _over(tolerance, dict(rule.fields), explicit=True)
        return tolerance

    def replay(self, dtype: str) -> ReplayTolerance:
        """Tolerance of a replay whose output has that dtype; integers count as float64."""
        return self.replays.get(dtype, self.replays["float64"])

    def exact_for(self, what: str, phase: Phase, name: str) -> float:
        """Relative tolerance of a setting (`hparams`, `lora_scale`), which a user's rule may widen."""
        tolerance = self.tolerance(phase, "float64", name)
        return tolerance.base if tolerance.explicit else self.exact[what]


def _over(under: Tolerance, fields: Mapping[str, float], *, explicit: bool) -> Tolerance:
    """A tolerance with some fields replaced."""
    return Tolerance(
        fields.get("base", under.base),
        fields.get("per_input", under.per_input),
        fields.get("bound", under.bound),
        explicit,
    )


@lru_cache(maxsize=1)
def default_policy() -> Policy:
    """The tolerances that are checked in."""
    return _parse(_read(DEFAULTS), Policy({}, {}, {}), str(DEFAULTS))


def load_policy(path: Path) -> Policy:
    """The defaults with a user's policy file over them.  Raises NotFound, NoPermission, BadConfig."""
    policy = _parse(_read(path), default_policy(), str(path))
    return replace(policy, file=str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise NoPermission(f"{path} may not be read", "mend its permissions (chmod u+r)") from error
    except OSError as error:
        raise NotFound(f"policy file {path} cannot be opened: {error.strerror or error}", "check the name") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"policy file {path} is not TOML: {error}") from error


def _parse(document: Mapping[str, Any], under: Policy, origin: str) -> Policy:
    tables, replays, exact = dict(under.tables), dict(under.replays), dict(under.exact)
    rules, noise, systematic = list(under.rules), under.noise, under.systematic
    phases = {phase.label for phase in Phase}
    for section, content in document.items():
        if section == "rule":
            rules += [_rule(entry, origin) for entry in _list(content, origin)]
        elif section == "exact":
            exact.update(_numbers(content, tuple(exact) or tuple(content), f"{origin}: [exact]"))
        elif section == "noise":
            noise = replace(noise, **_numbers(content, _NOISE_FIELDS, f"{origin}: [noise]"))
            if noise.quantile > 1.0:
                raise BadConfig(f"{origin}: [noise]: quantile must be between 0 and 1, not {noise.quantile:g}")
        elif section == "notes":
            systematic = _numbers(content, ("systematic",), f"{origin}: [notes]").get("systematic", systematic)
        elif section == "replay" or section in phases:
            for dtype, values in _dtypes(content, f"{origin}: [{section}]").items():
                where = f"{origin}: [{section}.{dtype}]"
                if section == "replay":
                    old = replays.get(dtype, ReplayTolerance(0.0, 0.0, 1.0, EPSILON[dtype]))
                    replays[dtype] = replace(old, **_numbers(values, _REPLAY_FIELDS, where))
                else:
                    known = tables.get((section, dtype), Tolerance(0.0))
                    tables[section, dtype] = _over(known, _numbers(values, _FIELDS, where), explicit=False)
        else:
            raise BadConfig(
                f"{origin}: unknown section [{section}]",
                f"use exact, noise, notes, replay, rule or one of {sorted(phases)}",
            )
    return Policy(tables, replays, exact, tuple(rules), under.file, noise, systematic)


def _list(content: Any, origin: str) -> list[Any]:
    if not isinstance(content, list):
        raise BadConfig(f"{origin}: rule must be a list of tables", "write [[rule]]")
    return content


def _dtypes(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise BadConfig(f"{where} needs a dtype", "for example [grad.float32]")
    for dtype, values in content.items():
        if dtype not in EPSILON or not isinstance(values, dict):
            raise BadConfig(f"{where}: {dtype!r} is not a dtype", f"use one of {', '.join(EPSILON)}")
    return content


def _numbers(values: Any, allowed: tuple[str, ...], where: str) -> dict[str, float]:
    if not isinstance(values, dict):
        raise BadConfig(f"{where} is not a table")
    for key, value in values.items():
        if key not in allowed:
            raise BadConfig(f"{where}: unknown setting {key!r}", f"use {', '.join(allowed)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise BadConfig(f"{where}: {key} must be a number of 0 or more, not {value!r}")
    return {key: float(value) for key, value in values.items()}


def _rule(entry: Any, origin: str) -> PolicyRule:
    where = f"{origin}: [[rule]]"
    if not isinstance(entry, dict):
        raise BadConfig(f"{where} is not a table")
    unknown = sorted(set(entry) - set(_RULE_FIELDS))
    if unknown:
        raise BadConfig(f"{where}: unknown setting {unknown[0]!r}", f"use {', '.join(_RULE_FIELDS)}")
    numbers = _numbers({key: entry[key] for key in _FIELDS if key in entry}, _FIELDS, where)
    if not numbers:
        raise BadConfig(f"{where} sets nothing", "give base, per_input or bound")
    globs = {key: entry.get(key, "*") for key in ("name", "phase", "dtype")}
    for key, value in globs.items():
        if not isinstance(value, str):
            raise BadConfig(f"{where}: {key} must be a glob, not {value!r}")
    return PolicyRule(globs["name"], globs["phase"], globs["dtype"], tuple(numbers.items()))
