"""One entry of the catalogue: a known divergence as data, read from a TOML file and checked strictly.

    title, finding, source = […]      what it is, and where it was met
    story = 4 / bug = 10              its row in the two lists that the catalogue covers
    emulated = "why"                  only where the real code cannot run on the machines that this is run on
    settings = {…}                    of all arms
    [arms.NAME]                       path or program; settings and options of its own; `from`, `init`, `batches`: an arm
                                      whose adapters or batches it takes; `record`: what else is recorded; `ranks`: how many
                                      processes torchrun starts of a program
    [[expect]]                        of two arms (a and b unless said): verdict, step, phase, names, causes;
                                      or of one arm: the error with which its recording ends

Arms a and clean are always there, and must be `same`.  Invariant: whatever an entry says is either checked against the
diff or shown to a reader; an unknown key is an error, never ignored.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scenarios.catalogue import programs
from scenarios.config import parse
from scenarios.paths import path_info
from tracer.errors import BadConfig
from tracer.schema import Phase

STORY_ROWS: Final = 18
BUG_ROWS: Final = 25
VERDICTS: Final = ("same", "diverged", "incomparable")
RULES: Final = ("all", "differing", "some")
NO_CAUSE: Final = "unexplained"
_ENTRY: Final = {
    "title": str, "finding": str, "source": list, "story": int, "bug": int, "emulated": str, "settings": dict,
    "record": dict, "arms": dict, "expect": list,
}  # fmt: skip
_ARM: Final = {
    "path": str, "program": str, "like": str, "settings": dict, "options": dict, "from": str, "init": str,
    "batches": str, "record": dict, "ranks": int,
}  # fmt: skip
_RECORD: Final = {"forward": bool, "micro_grads": bool, "token_loss": bool, "modules": list}
_EXPECT: Final = {
    "pair": list, "arm": str, "error": str, "verdict": str, "bits": bool, "step": int, "phase": str, "kind": str,
    "names": list, "rule": str, "cause": str, "parameters": dict, "tolerance": float, "side": str, "also": list,
    "notes": list,
}  # fmt: skip
_CAUSE: Final = {"id": str, "step": int, "phase": str, "side": str, "parameters": dict, "tolerance": float}
_FINDING_ONLY: Final = ("step", "phase", "kind", "names", "rule", "cause", "parameters", "side", "also")
_CLOSE: Final = 1e-6
Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ArmSpec:
    """One run: a path or a program of the catalogue, its settings (dotted keys), and what it takes from other arms.

    `options` are a program's own.  `record` are fields of `RecordOptions` beside the default phases, `forward` among them.
    """

    name: str
    runner: str
    program: bool
    settings: Settings
    options: Settings
    init: str | None
    batches: str | None
    record: Settings
    ranks: int = 1

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the arms that must be recorded before this one."""
        return tuple(dict.fromkeys(name for name in (self.init, self.batches) if name is not None))


@dataclass(frozen=True, slots=True)
class CauseSpec:
    """A cause that the diff must name: parameters as numbers within `tolerance` (relative), anything else exactly."""

    id: str
    step: int | None = None
    phase: str | None = None
    side: str | None = None
    parameters: Mapping[str, Any] | None = None
    tolerance: float = _CLOSE


@dataclass(frozen=True, slots=True)
class Expectation:
    """What `trace diff` must say of two arms, or with which error the recording of one must end.

    `first` is the cause that must come first (None: any or none; NO_CAUSE: none at that address), `also` are others that
    must be there, wherever in the list.  `names` are globs over the records at the first address; by `rule`, the report names
    *all* records there that match them, just those whose bits are *differing*, or *some* of them; never another one.
    `bits`: every record compared is the same to the bit.  `notes`: ids.
    """

    arms: tuple[str, ...]
    verdict: str = "diverged"
    error: str = ""
    bits: bool = False
    step: int | None = None
    phase: str | None = None
    kind: str | None = None
    names: tuple[str, ...] = ()
    rule: str = "differing"
    first: CauseSpec | None = None
    also: tuple[CauseSpec, ...] = ()
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """The expectation in one line."""
        if self.error:
            return f"recording {self.arms[0]} ends with the error {self.error}"
        if self.verdict != "diverged":
            return self.verdict + (" to the bit" if self.bits else "")
        where = ", ".join([f"step {self.step}", str(self.phase), *self.names])
        causes = [cause.id for cause in ((self.first,) if self.first else ()) + self.also]
        return where + (": " + ", ".join(causes) if causes else "")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry.  `id` is the name of its file; `rows` are those it covers, as `story 4` and `bug 10`."""

    id: str
    title: str
    finding: str
    source: tuple[str, ...]
    rows: tuple[str, ...]
    emulated: str
    arms: Mapping[str, ArmSpec]
    expectations: tuple[Expectation, ...]

    @property
    def checks(self) -> tuple[Expectation, ...]:
        """All that is expected of it, that the clean arm is `same` as arm a last."""
        return (*self.expectations, Expectation(("a", "clean"), "same"))


def read_entry(file: Path) -> Entry:
    """The entry of a file; raises BadConfig with the place and what is allowed there."""
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{file.name} is not a readable TOML file: {error}") from error
    return parse_entry(file.stem, table)


def parse_entry(name: str, table: Mapping[str, Any]) -> Entry:
    """The entry of a parsed table; raises BadConfig."""
    _known(name, table, _ENTRY)
    for key in ("title", "finding", "source", "arms", "expect"):
        if not table.get(key):
            raise BadConfig(f"{name}: {key} is missing")
    entry = Entry(
        id=name,
        title=table["title"],
        finding=" ".join(table["finding"].split()),
        source=tuple(table["source"]),
        rows=tuple(_rows(name, table)),
        emulated=table.get("emulated", ""),
        arms=_arms(name, table),
        expectations=tuple(_expectation(f"{name}: expect", given) for given in table["expect"]),
    )
    _consistent(entry)
    return entry


def _known(place: str, table: Mapping[str, Any], allowed: Mapping[str, type[Any]]) -> None:
    for key, value in table.items():
        if key not in allowed:
            raise BadConfig(f"{place}: {key} is not known", f"known are {', '.join(allowed)}")
        kinds = (int, float) if allowed[key] is float else allowed[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and allowed[key] is not bool):
            raise BadConfig(f"{place}: {key} must be of type {allowed[key].__name__}, not {value!r}")


def _rows(name: str, table: Mapping[str, Any]) -> Iterable[str]:
    for key, most in (("story", STORY_ROWS), ("bug", BUG_ROWS)):
        if key in table:
            if not 1 <= table[key] <= most:
                raise BadConfig(f"{name}: {key} = {table[key]} is not a row", f"use 1 to {most}")
            yield f"{key} {table[key]}"


def _arms(name: str, table: Mapping[str, Any]) -> dict[str, ArmSpec]:
    common: dict[str, Any] = {"settings": table.get("settings", {}), "record": table.get("record", {})}
    raw: dict[str, dict[str, Any]] = {}
    for arm, given in table["arms"].items():
        place = f"{name}: arms.{arm}"
        if not isinstance(given, Mapping):
            raise BadConfig(f"{place} is not a table")
        _known(place, given, _ARM)
        base = common
        if "like" in given:
            if given["like"] not in raw:
                raise BadConfig(f"{place}: like = {given['like']!r} is not an arm above it")
            base = raw[given["like"]]
        raw[arm] = _over(base, given)
    return {arm: _arm(f"{name}: arms.{arm}", arm, given) for arm, given in raw.items()}


def _over(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """An arm's table laid over another's; settings, options and recording key by key."""
    merged = {**base, **given}
    for key in ("settings", "options", "record"):
        merged[key] = {**flatten(base.get(key, {})), **flatten(given.get(key, {}))}
    if {"path", "program"} <= merged.keys():  # the one that was given wins
        merged.pop("program" if "path" in given else "path")
    return merged


def _arm(place: str, name: str, given: Mapping[str, Any]) -> ArmSpec:
    if ("path" in given) == ("program" in given):
        raise BadConfig(f"{place} needs either path or program")
    if given["options"] and "path" in given:
        raise BadConfig(f"{place}: options belong to a program", "use settings")
    if given.get("ranks", 1) < 1 or (given.get("ranks", 1) > 1 and "path" in given):
        raise BadConfig(f"{place}: ranks are processes of a program, 1 or more")
    _known(f"{place}.record", given["record"], _RECORD)
    return ArmSpec(
        name=name,
        runner=given.get("path") or given["program"],
        program="program" in given,
        settings=given["settings"],
        options=given["options"],
        init=given.get("init", given.get("from")),
        batches=given.get("batches", given.get("from")),
        record=given["record"],
        ranks=given.get("ranks", 1),
    )


def _expectation(place: str, given: Any) -> Expectation:
    if not isinstance(given, Mapping):
        raise BadConfig(f"{place} is not a list of tables")
    _known(place, given, _EXPECT)
    if "error" in given:
        return Expectation((given.get("arm", "b"),), error=given["error"])
    verdict, rule = given.get("verdict", "diverged"), given.get("rule", "differing")
    if verdict not in VERDICTS or rule not in RULES:
        raise BadConfig(f"{place}: verdict is one of {', '.join(VERDICTS)}, rule one of {', '.join(RULES)}")
    if verdict != "diverged" and (extra := [key for key in _FINDING_ONLY if key in given]):
        raise BadConfig(f"{place}: {extra[0]} goes with the verdict diverged")
    if verdict == "diverged":
        if missing := [key for key in ("step", "phase", "names") if key not in given]:
            raise BadConfig(f"{place}: {missing[0]} is missing", "a divergence has a step, a phase and names")
        Phase.parse(given["phase"])
    return Expectation(
        arms=tuple(given.get("pair", ("a", "b"))),
        verdict=verdict,
        bits=given.get("bits", False),
        step=given.get("step"),
        phase=given.get("phase"),
        kind=given.get("kind"),
        names=tuple(given.get("names", ())),
        rule=rule,
        first=_first(place, given),
        also=tuple(_cause(place, other) for other in given.get("also", ())),
        notes=tuple(given.get("notes", ())),
    )


def _first(place: str, given: Mapping[str, Any]) -> CauseSpec | None:
    mine = {key: given[key] for key in ("parameters", "tolerance", "side") if key in given}
    if "cause" not in given:
        if mine:
            raise BadConfig(f"{place}: {next(iter(mine))} belongs to a cause")
        return None
    return _cause(place, {"id": given["cause"], **mine})


def _cause(place: str, given: Any) -> CauseSpec:
    if not isinstance(given, Mapping) or "id" not in given:
        raise BadConfig(f"{place}: a cause is a table with an id")
    _known(f"{place}: cause", given, _CAUSE)
    return CauseSpec(**given)


def _consistent(entry: Entry) -> None:
    """Arms that are named exist, and no pair is an arm and itself."""
    for needed in ("a", "clean"):
        if needed not in entry.arms:
            raise BadConfig(f"{entry.id}: there is no arm {needed}")
    above: list[str] = []
    for arm in entry.arms.values():
        if wrong := [name for name in arm.sources if name not in above]:
            raise BadConfig(f"{entry.id}: arms.{arm.name} takes something from {wrong[0]}, which is no arm above it")
        above.append(arm.name)
    for name in (name for expectation in entry.expectations for name in expectation.arms):
        if name not in entry.arms:
            raise BadConfig(f"{entry.id}: {name} is not an arm", f"arms are {', '.join(entry.arms)}")
    for arm in entry.arms.values():
        _runnable(arm)
        parse(_nested(arm.settings), place=f"{entry.id}: arms.{arm.name}")
    for expectation in entry.checks:
        _distinct(entry, expectation.arms)


def _runnable(arm: ArmSpec) -> None:
    """Raises BadUsage or BadConfig where there is no such path or program."""
    if not arm.program:
        path_info(arm.runner)
    elif arm.runner not in programs.names():
        raise BadConfig(f"there is no program called {arm.runner}", f"known are {', '.join(programs.names())}")


def _distinct(entry: Entry, pair: Sequence[str]) -> None:
    if len(pair) == 2 and identity(entry.arms, pair[0]) == identity(entry.arms, pair[1]):
        raise BadConfig(f"{entry.id}: arms {pair[0]} and {pair[1]} are the same run", "nothing would be compared")


def identity(arms: Mapping[str, ArmSpec], name: str) -> dict[str, Any]:
    """Everything that makes the run of an arm, as JSON-able data: equal identities are one recording."""
    arm = arms[name]
    return {
        "runner": arm.runner,
        "program": arm.program,
        "settings": parse(_nested(arm.settings)).flat(),
        "options": dict(sorted(arm.options.items())),
        "ranks": arm.ranks,
        "init": identity(arms, arm.init) if arm.init else None,
        "batches": identity(arms, arm.batches) if arm.batches else None,
        "record": {key: value for key, value in sorted(arm.record.items()) if value},
    }


def _nested(settings: Settings) -> dict[str, Any]:
    """Dotted keys as a table; `defaults` stays where it is."""
    table: dict[str, Any] = {}
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if dot:
            table.setdefault(section, {})[name] = value
        else:
            table[section] = value
    return table


def flatten(table: Mapping[str, Any]) -> dict[str, Any]:
    """A table as dotted keys, one level deep: `{"lora": {"rank": 8}}` -> `{"lora.rank": 8}`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            flat[key] = value
    return flat
