"""One configuration for every training path: `run.toml` -> RunConfig.

Each setting has a type, a range and a default in one place (the `_field` calls below).  An unknown key or a value
outside its range is a BadConfig that names the place and what is allowed; nothing is ever guessed or dropped.
Invariant: `parse(unflatten(config.flat()))` is the same configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from scenarios.defaults import DEFAULTS, library_defaults
from tracer.errors import BadConfig, NotFound

SEVEN: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Check(Protocol):
    """What a setting may be: `allowed` says it in words, calling it returns the value or raises ValueError."""

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""

    def __call__(self, value: Any) -> Any:
        """The value in its own type; raises ValueError."""


@dataclass(frozen=True, slots=True)
class _OneOf:
    choices: tuple[Any, ...]

    @property
    def allowed(self) -> str:
        return "one of " + ", ".join(json.dumps(choice) for choice in self.choices)

    def __call__(self, value: Any) -> Any:
        for choice in self.choices:  # `1 == True` in Python: the type counts too
            if type(choice) is type(value) and choice == value:
                return choice
        raise ValueError


@dataclass(frozen=True, slots=True)
class _Whole:
    low: int

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.low}"

    def __call__(self, value: Any) -> int:
        if type(value) is not int or value < self.low:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class _Real:
    low: float
    below: float = math.inf
    open_at_low: bool = False

    @property
    def allowed(self) -> str:
        start = f"above {self.low:g}" if self.open_at_low else f"from {self.low:g}"
        return f"a number {start}" + (f", below {self.below:g}" if self.below < math.inf else "")

    def __call__(self, value: Any) -> float:
        number = float(value) if type(value) in (int, float) else math.nan
        if not (self.low < number if self.open_at_low else self.low <= number) or not number < self.below:
            raise ValueError
        return number


@dataclass(frozen=True, slots=True)
class _Text:
    words: str = "a non-empty string"

    @property
    def allowed(self) -> str:
        return self.words

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str) or not value:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class _Many:
    item: _Check
    size: int | None = None
    word: str | None = None  # a string that stands for a whole list, "linear"
    may_be_empty: bool = False

    @property
    def allowed(self) -> str:
        size = f"{self.size} items" if self.size else "items"
        head = f"{json.dumps(self.word)} or " if self.word else ""
        empty = ", or []" if self.may_be_empty else ""
        return f"{head}a list of {size}, each {self.item.allowed}{empty}"

    def __call__(self, value: Any) -> Any:
        if self.word is not None and value == self.word:
            return self.word
        if not isinstance(value, list | tuple):
            raise ValueError
        if not value and self.may_be_empty:
            return ()
        if not value or (self.size is not None and len(value) != self.size):
            raise ValueError
        return tuple(self.item(item) for item in value)


@dataclass(frozen=True, slots=True)
class _Either:
    word: str
    other: _Check

    @property
    def allowed(self) -> str:
        return f"{json.dumps(self.word)} or {self.other.allowed}"

    def __call__(self, value: Any) -> Any:
        return self.word if value == self.word else self.other(value)


def _field(default: Any, check: _Check) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which base model: a tiny one by name, a local folder or a hub id; cast to `dtype` after loading."""

    name: str = _field("tiny-llama", _Text("a tiny model's name, a local folder or a hub id"))
    dtype: str = _field("float32", _OneOf(("float32", "bfloat16", "float16", "checkpoint")))


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Rows of tokens and how they become batches.  Lengths and positions are in tokens, rows and positions from 0.

    `batching = "plain"`: the same batches on every path, right-padded to the longest row.  `"library"`: the path's own
    loader (HF's sampler and collator, mlx-lm's `iterate_batches`); a hand-written loop has none and batches plainly.
    `mask_label = [row, position]` takes one label of the first micro-batch of step `mask_step` out of the loss.
    """

    source: str = _field("synthetic", _Text('"synthetic" or a .jsonl file of {"text": …}'))
    rows: int = _field(32, _Whole(1))
    row_length: int = _field(24, _Whole(2))
    variable: bool = _field(True, _OneOf((True, False)))
    seed: int = _field(0, _Whole(0))
    order: str = _field("file", _OneOf(("file", "shuffled")))
    order_seed: int = _field(0, _Whole(0))
    batching: str = _field("plain", _OneOf(("plain", "library")))
    mask_label: tuple[int, ...] = _field((), _Many(_Whole(0), size=2, may_be_empty=True))
    mask_step: int = _field(1, _Whole(1))


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The adapter.  The effective scale is alpha / rank on every path; `layers` counts from the last one."""

    rank: int = _field(8, _Whole(1))
    alpha: float = _field(16.0, _Real(0.0, open_at_low=True))
    dropout: float = _field(0.0, _Real(0.0, below=1.0))
    targets: str | tuple[str, ...] = _field(SEVEN, _Many(_Text("a module's name"), word="linear"))
    layers: int | str = _field("all", _Either("all", _Whole(1)))


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The loop.  `compile = "default"` is what the path does by itself (mlx: compiled, torch: eager)."""

    steps: int = _field(10, _Whole(1))
    batch: int = _field(2, _Whole(1))
    accumulation: int = _field(1, _Whole(1))
    seed: int = _field(0, _Whole(0))
    seed_at: str = _field("after-load", _OneOf(("before-load", "after-load")))
    compile: bool | str = _field("default", _OneOf(("default", True, False)))
    device: str = _field("default", _OneOf(("default", "cpu")))


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The optimizer and its learning rate.  `warmup` is in optimizer steps, `lr` is the peak."""

    name: str = _field("adamw", _OneOf(("adamw", "adam", "sgd")))
    lr: float = _field(1e-3, _Real(0.0))
    schedule: str = _field("constant", _OneOf(("constant", "linear", "cosine")))
    warmup: int = _field(0, _Whole(0))
    weight_decay: float = _field(0.0, _Real(0.0))
    betas: tuple[float, float] = _field((0.9, 0.999), _Many(_Real(0.0, below=1.0), size=2))
    eps: float = _field(1e-8, _Real(0.0))
    bias_correction: bool = _field(True, _OneOf((True, False)))


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """Gradient clipping: element-wise to ±value, or the global L2 norm to value."""

    mode: str = _field("none", _OneOf(("none", "value", "norm")))
    value: float = _field(1.0, _Real(0.0, open_at_low=True))


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)

    def flat(self) -> dict[str, Any]:
        """Dotted keys, JSON-able values: `{"lora.rank": 8, …}`, as `tracer.declare` takes them."""
        sections = dataclasses.asdict(self)
        return {f"{s}.{k}": list(v) if isinstance(v, tuple) else v for s, t in sections.items() for k, v in t.items()}


SECTIONS: Final[dict[str, type[Any]]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "lora": LoraConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "clip": ClipConfig,
}
S = TypeVar("S")


def load(path: str | Path | None, overrides: Sequence[str] = (), *, model: str | None = None) -> RunConfig:
    """Configuration of a TOML file (None: all defaults), with `section.key=value` overrides applied.

    Raises NotFound, or BadConfig with the place and what is allowed there.
    """
    table = _read(Path(path)) if path is not None else {}
    place = str(path) if path is not None else "run configuration"
    for override in overrides:
        _set(table, override)
    if model is not None:
        table.setdefault("model", {})["name"] = model
    return parse(table, place=place)


def parse(table: Mapping[str, Any], *, place: str = "run configuration") -> RunConfig:
    """RunConfig of a parsed TOML table; raises BadConfig."""
    given = dict(table)
    name = given.pop("defaults", "plain")
    if name not in DEFAULTS:
        raise BadConfig(f"{place}: defaults = {_shown(name)} is not known", f"use {_OneOf(tuple(DEFAULTS)).allowed}")
    for section, value in given.items():
        if section not in SECTIONS:
            raise BadConfig(f"{place}: [{section}] is not a section", _suggest(section, [*SECTIONS, "defaults"]))
        if not isinstance(value, Mapping):
            raise BadConfig(f"{place}: {section} is not a table", f"write [{section}] and its keys below it")
    merged = library_defaults(name, given)
    return RunConfig(**{s: _section(cls, merged.get(s, {}), f"{place}: {s}") for s, cls in SECTIONS.items()})


def unflatten(flat: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Inverse of `RunConfig.flat`."""
    table: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        section, _, name = key.partition(".")
        table.setdefault(section, {})[name] = value
    return table


def _section(cls: type[S], table: Mapping[str, Any], place: str) -> S:
    checks: dict[str, _Check] = {f.name: f.metadata["check"] for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in checks:
            raise BadConfig(f"{place}.{key} is not a setting", _suggest(key, list(checks)))
        try:
            values[key] = checks[key](value)
        except ValueError:
            raise BadConfig(f"{place}.{key} = {_shown(value)} is not allowed", f"use {checks[key].allowed}") from None
    return cls(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist", "give the path of a run configuration (TOML)") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path} is not a readable TOML file: {error}") from error


def _set(table: dict[str, Any], override: str) -> None:
    """Apply `section.key=value`; the value is TOML, a bare word counts as a string."""
    key, equals, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not equals or (not dot and section != "defaults"):
        raise BadConfig(f"--set {override} cannot be read", "write --set section.key=value, as in optimizer.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if not dot:
        table[section] = value
        return
    inner = table.setdefault(section, {})
    if not isinstance(inner, dict):
        raise BadConfig(f"--set {override}: {section} is not a table")
    inner[name] = value


def _suggest(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"known are {', '.join(known)}"


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
