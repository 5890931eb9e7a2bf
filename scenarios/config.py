"""One configuration for every training path: `run.toml` -> RunConfig.

Each setting has a type, a range and a default in one place (the `_field` calls below).  An unknown key or a value
outside its range is a BadConfig that names the place and what is allowed; nothing is ever guessed or dropped.
Invariant: `parse(unflatten(config.flat()))` is the same configuration.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, TypeVar

from scenarios.checks import Check, Either, Many, OneOf, Real, Text, Whole
from scenarios.defaults import DEFAULTS, library_defaults
from tracer.errors import BadConfig, NotFound

SEVEN: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _field(default: Any, check: Check) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which base model: a tiny one by name, a local folder or a hub id; cast to `dtype` after loading.

    `dtype = "library"` tells the loader nothing: transformers and mlx-lm then keep the checkpoint's, unsloth casts.
    `attention` chooses among the implementations of transformers; the MLX paths have one.
    """

    name: str = _field("tiny-llama", Text("a tiny model's name, a local folder or a hub id"))
    dtype: str = _field("float32", OneOf(("float32", "bfloat16", "float16", "checkpoint", "library")))
    attention: str = _field("default", OneOf(("default", "eager", "sdpa")))


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Rows of tokens and how they become batches.  Lengths and positions are in tokens, rows and positions from 0.

    `batching = "plain"`: the same batches on every path, right-padded to the longest row.  `"library"`: the path's own
    loader (HF's sampler and collator, mlx-lm's `iterate_batches`); a hand-written loop has none and batches plainly.
    `order = "length"` sorts the rows, shortest first.  `mask_label = [row, position]` takes one label of the first
    micro-batch of step `mask_step` out of the loss.  `bos` and `eos`: how often the token that begins or ends a row
    stands there before rows are cut to `row_length` (`"tokenizer"`: as the tokenizer does it).  `pad_extra`: columns of
    padding beyond the longest row.  `supervise`: which tokens are targets: all; all and the first padding behind them, as
    in mlx-lm's own loss; all but each row's last.
    """

    source: str = _field("synthetic", Text('"synthetic" or a .jsonl file of {"text": …}'))
    rows: int = _field(32, Whole(1))
    row_length: int = _field(24, Whole(2))
    variable: bool = _field(True, OneOf((True, False)))
    seed: int = _field(0, Whole(0))
    order: str = _field("file", OneOf(("file", "shuffled", "length")))
    order_seed: int = _field(0, Whole(0))
    bos: int | str = _field("tokenizer", Either("tokenizer", Whole(0)))
    eos: int | str = _field(1, Either("tokenizer", Whole(0)))
    pad_extra: int = _field(0, Whole(0))
    supervise: str = _field("tokens", OneOf(("tokens", "tokens-and-pad", "all-but-last")))
    batching: str = _field("plain", OneOf(("plain", "library")))
    mask_label: tuple[int, ...] = _field((), Many(Whole(0), size=2, may_be_empty=True))
    mask_step: int = _field(1, Whole(1))


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The adapter.  `layers` counts from the last one.

    The effective scale is alpha / rank on every path, or `scale` itself where that is a number; PEFT is then told
    scale · rank as its alpha.
    """

    rank: int = _field(8, Whole(1))
    alpha: float = _field(16.0, Real(0.0, open_at_low=True))
    scale: float | str = _field("alpha/rank", Either("alpha/rank", Real(0.0, open_at_low=True)))
    dropout: float = _field(0.0, Real(0.0, below=1.0))
    targets: str | tuple[str, ...] = _field(SEVEN, Many(Text("a module's name"), word="linear"))
    layers: int | str = _field("all", Either("all", Whole(1)))

    @property
    def effective_scale(self) -> float:
        """The factor that the adapter's output is multiplied with."""
        return self.alpha / self.rank if isinstance(self.scale, str) else self.scale


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The loop.  `"default"` and `"library"` are what the path does by itself.

    `compile`: mlx compiles by itself, torch does not.  `checkpointing`: activations are computed again in the backward
    pass (TRL and unsloth do so by themselves).  `autocast`: mixed precision around the forward pass (PyTorch only; TRL
    does so in bfloat16 by itself).  `data_seed`: what orders a library's own batches, `"seed"` is `train.seed`.
    `validate_every`: validate each so many optimizer steps on `validation_batches` batches of the same rows, 0 never.
    """

    steps: int = _field(10, Whole(1))
    batch: int = _field(2, Whole(1))
    accumulation: int = _field(1, Whole(1))
    seed: int = _field(0, Whole(0))
    seed_at: str = _field("after-load", OneOf(("before-load", "after-load")))
    compile: bool | str = _field("default", OneOf(("default", True, False)))
    device: str = _field("default", OneOf(("default", "cpu")))
    checkpointing: bool | str = _field(False, OneOf(("library", True, False)))
    autocast: str = _field("none", OneOf(("library", "none", "bfloat16")))
    data_seed: int | str = _field("seed", Either("seed", Whole(0)))
    validate_every: int = _field(0, Whole(0))
    validation_batches: int = _field(1, Whole(1))


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The optimizer and its learning rate.  `warmup` is in optimizer steps, `lr` is the peak."""

    name: str = _field("adamw", OneOf(("adamw", "adam", "sgd")))
    lr: float = _field(1e-3, Real(0.0))
    schedule: str = _field("constant", OneOf(("constant", "linear", "cosine")))
    warmup: int = _field(0, Whole(0))
    weight_decay: float = _field(0.0, Real(0.0))
    betas: tuple[float, float] = _field((0.9, 0.999), Many(Real(0.0, below=1.0), size=2))
    eps: float = _field(1e-8, Real(0.0))
    bias_correction: bool = _field(True, OneOf((True, False)))


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """Gradient clipping: element-wise to ±value, the global L2 norm to value, or each tensor's own L2 norm to value.

    `"library"`: nothing is said of it to the library, `value` is not used.
    """

    mode: str = _field("none", OneOf(("none", "value", "norm", "tensor", "library")))
    value: float = _field(1.0, Real(0.0, open_at_low=True))


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The loss.  `"library"` is what the path does by itself; see docs/paths.md.

    `reduction`: how micro-batches of different sizes make one gradient; `"token-mean"` weights every token of the step
    equally, `"mean-of-means"` every micro-batch.  `precision`: cross-entropy of float32 logits, or of logits in the
    model's own dtype.
    """

    reduction: str = _field("library", OneOf(("library", "token-mean", "mean-of-means")))
    precision: str = _field("library", OneOf(("library", "float32", "model")))


_PARTS: Final = ("path", "mlx", "mlx-lm", "unsloth-mlx")


@dataclass(frozen=True, slots=True)
class PartsConfig:
    """Hybrids of the MLX paths: whose loader and LoRA set-up, whose loss, whose loop; `"path"` is the path's own.

    `trace record --path mlx --set parts.loss=mlx-lm` is the hand-written loop with mlx-lm's `default_loss`.
    """

    loader: str = _field("path", OneOf(("path", "mlx-lm", "unsloth-mlx")))
    loss: str = _field("path", OneOf(_PARTS))
    loop: str = _field("path", OneOf(_PARTS))


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parts: PartsConfig = field(default_factory=PartsConfig)

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
    "loss": LossConfig,
    "parts": PartsConfig,
}
S = TypeVar("S")


def load(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    base: Mapping[str, Mapping[str, Any]] | None = None,
) -> RunConfig:
    """Configuration of a TOML file (None: all defaults), with `section.key=value` overrides applied.

    `base`: what a path takes unless something else is given.  Raises NotFound, or BadConfig with the place and what is
    allowed there.
    """
    table = _read(Path(path)) if path is not None else {}
    place = str(path) if path is not None else "run configuration"
    for override in overrides:
        _set(table, override)
    if model is not None:
        table.setdefault("model", {})["name"] = model
    for section, values in (base or {}).items():
        given = table.get(section, {})
        if isinstance(given, Mapping):
            table[section] = {**values, **given}
    return parse(table, place=place)


def parse(table: Mapping[str, Any], *, place: str = "run configuration") -> RunConfig:
    """RunConfig of a parsed TOML table; raises BadConfig."""
    given = dict(table)
    name = given.pop("defaults", "plain")
    if name not in DEFAULTS:
        raise BadConfig(f"{place}: defaults = {_shown(name)} is not known", f"use {OneOf(tuple(DEFAULTS)).allowed}")
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
    checks: dict[str, Check] = {f.name: f.metadata["check"] for f in fields(cls)}  # type: ignore[arg-type]
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
