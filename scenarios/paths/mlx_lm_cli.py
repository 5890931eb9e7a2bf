"""Path `mlx-lm-cli`: `python -m mlx_lm lora --config`, the program itself.

This path writes what a user would write, a configuration file and a data folder, and then runs the module as `python -m`
does, in this very process, so that a recorder around it sees that program and nothing else.  It seeds, loads, orders
its batches and schedules the rate by itself; what its configuration file cannot say is refused.  Notable: its warm-up
is one step longer than transformers'.  Of the end of the run only the files are known that it wrote: the adapters after
every step.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from scenarios.config import LossConfig, PartsConfig, RunConfig
from scenarios.feed import Feed
from scenarios.models import model_source
from scenarios.outcome import Outcome, numpy_state
from tracer.errors import BadConfig, BadUsage

_INSIDE: Final = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}


def run(config: RunConfig, feed: Feed) -> Outcome:
    """Run the program; raises BadConfig for what it cannot be told."""
    _refuse(config, feed)
    with tempfile.TemporaryDirectory(prefix="mlx-lm-cli-") as name:
        folder = Path(name)
        program = write_program(config, feed, folder)
        _run_module(program)
        return _outcome(folder / "adapters", config)


def write_program(config: RunConfig, feed: Feed, folder: Path) -> tuple[str, ...]:
    """Write its files into `folder`; the program as `python -m` takes it."""
    data = folder / "data"
    data.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in feed.texts or ())
    (data / "train.jsonl").write_text(lines, "utf-8")
    if config.train.validate_every:
        (data / "valid.jsonl").write_text(lines, "utf-8")
    settings = _settings(config, folder)
    if feed.adapters is not None:
        settings["resume_adapter_file"] = str(_write_adapters(feed, config, folder / "given.safetensors"))
    file = folder / "lora.yaml"
    file.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")  # JSON is YAML
    return ("mlx_lm", "lora", "--config", str(file))


def _settings(config: RunConfig, folder: Path) -> dict[str, Any]:
    train, lora, optimizer = config.train, config.lora, config.optimizer
    parameters: dict[str, Any] = {"rank": lora.rank, "dropout": lora.dropout, "scale": lora.effective_scale}
    if lora.targets != "linear":
        parameters["keys"] = [f"{_INSIDE[target]}.{target}" for target in lora.targets]
    iterations = train.steps * train.accumulation
    settings: dict[str, Any] = {
        "model": _model(config, folder),
        "train": True,
        "data": str(folder / "data"),
        "adapter_path": str(folder / "adapters"),
        "seed": train.seed,
        "num_layers": -1 if lora.layers == "all" else lora.layers,
        "lora_parameters": parameters,
        "batch_size": train.batch,
        "iters": iterations,
        "grad_accumulation_steps": train.accumulation,
        "max_seq_length": config.data.row_length,
        "grad_checkpoint": train.checkpointing is True,
        "val_batches": train.validation_batches,
        "steps_per_eval": max(1, train.validate_every * train.accumulation),
        "steps_per_report": 1,
        "save_every": train.accumulation,
        "optimizer": optimizer.name,
        "optimizer_config": {optimizer.name: _optimizer(config)},
        "learning_rate": optimizer.lr,
    }
    return settings | _schedule(config)


def _model(config: RunConfig, folder: Path) -> str:
    """The checkpoint; converted by mlx-lm where another dtype is asked for, as the program takes it as it is."""
    source = model_source(config.model.name)
    if config.model.dtype in _dtypes(config):
        return source
    from mlx_lm import convert

    converted = folder / "model"
    convert(source, mlx_path=str(converted), dtype=config.model.dtype)
    return str(converted)


def _optimizer(config: RunConfig) -> dict[str, Any]:
    settings = config.optimizer
    options: dict[str, Any] = {} if settings.name == "adam" else {"weight_decay": settings.weight_decay}
    if settings.name != "sgd":
        options |= {
            "betas": list(settings.betas),
            "eps": settings.eps,
            "bias_correction": settings.bias_correction,
        }
    return options


def _schedule(config: RunConfig) -> dict[str, Any]:
    settings, span = config.optimizer, max(1, config.train.steps - config.optimizer.warmup)
    if settings.schedule == "constant" and not settings.warmup:
        return {}
    name, arguments = {
        "constant": ("step_decay", [settings.lr, 1.0, span]),
        "linear": ("linear_schedule", [settings.lr, 0.0, span]),
        "cosine": ("cosine_decay", [settings.lr, span]),
    }[settings.schedule]
    return {"lr_schedule": {"name": name, "arguments": arguments, "warmup": settings.warmup}}


def _write_adapters(feed: Feed, config: RunConfig, file: Path) -> Path:
    """Given adapters under mlx-lm's names and in its layout; raises BadUsage for another rank."""
    from safetensors.numpy import save_file

    assert feed.adapters is not None
    turned: dict[str, npt.NDArray[Any]] = {}
    for name, data in feed.adapters.items():
        if data.shape[0 if ".lora_A." in name else 1] != config.lora.rank:
            raise BadUsage(f"the given {name} has shape {list(data.shape)}", "use the same lora.rank for both runs")
        own = name.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")
        turned[own] = np.ascontiguousarray(data.T)
    save_file(turned, str(file))
    return file


def _run_module(program: tuple[str, ...]) -> None:
    """As `python -m` would, with the caller's own arguments put back afterwards."""
    arguments = sys.argv
    sys.argv = list(program)
    try:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    finally:
        sys.argv = arguments


def _outcome(adapters: Path, config: RunConfig) -> Outcome:
    """What the program left behind: adapters after each step, states of the generators of this process."""
    import mlx.core as mx
    from safetensors.numpy import load_file

    generator: Any = mx.random.state
    rng = {"mlx": np.array(generator[0]), "numpy": numpy_state()}
    saved: dict[str, npt.NDArray[Any]] = {}
    for step in range(1, config.train.steps + 1):
        file = adapters / f"{step * config.train.accumulation:07d}_adapters.safetensors"
        saved |= {f"{step}/{name}": array for name, array in load_file(str(file)).items()}
    return Outcome(None, saved, None, rng)


def _refuse(config: RunConfig, feed: Feed) -> None:
    if feed.steps is not None:
        raise BadConfig("mlx_lm lora makes its own batches", 'use data.batching = "library", without --batches-from')
    if feed.texts is None:
        raise BadConfig(
            "mlx_lm lora makes tokens of texts by itself",
            'use data.variable = true, data.bos = "tokenizer" and data.eos = 1',
        )
    told: dict[str, tuple[bool, str]] = {
        "model.attention": (config.model.attention != "default", "MLX has one implementation"),
        "lora.targets": (_unknown_targets(config), "its modules are given by their place in a layer"),
        "train.seed_at": (config.train.seed_at != "after-load", "it seeds right before it builds the adapters"),
        "train.data_seed": (config.train.data_seed != "seed", "it has one seed"),
        "train.compile": (config.train.compile is False, "it always compiles"),
        "train.device": (config.train.device != "default", "it runs where MLX runs by itself"),
        "train.autocast": (config.train.autocast == "bfloat16", "MLX has no autocast"),
        "clip": (config.clip.mode not in ("none", "library"), 'it never clips; use clip.mode = "none"'),
        "loss": (_other_loss(config.loss, config), "its loss averages micro-batches, in the dtype of the logits"),
        "parts": (config.parts != PartsConfig(), "the program cannot be taken apart; use the path mlx-lm"),
        "optimizer.weight_decay": (
            config.optimizer.name == "adam" and config.optimizer.weight_decay != 0,
            "MLX's Adam has none",
        ),
    }
    for name, (asked, reason) in told.items():
        if asked:
            raise BadConfig(f"{name}: mlx_lm lora cannot be told that", reason)


def _dtypes(config: RunConfig) -> tuple[str, ...]:
    """Names for the checkpoint's dtype."""
    file = Path(model_source(config.model.name), "config.json")
    settings = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return "checkpoint", "library", str(settings.get("dtype") or settings.get("torch_dtype"))


def _unknown_targets(config: RunConfig) -> bool:
    return config.lora.targets != "linear" and any(target not in _INSIDE for target in config.lora.targets)


def _other_loss(loss: LossConfig, config: RunConfig) -> bool:
    weighted = loss.reduction == "token-mean" and config.train.accumulation > 1
    return weighted or (loss.precision == "float32" and "float32" not in _dtypes(config))
