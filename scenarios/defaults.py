"""What each library does when it is told nothing, as run-configuration tables.

`plain` are this project's own (the dataclass defaults of scenarios/config.py); `mlx-lm`, `peft`, `trl` and `unsloth` are those
of the libraries, with the place where each is set.  A setting that is given always wins over these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

# mlx_lm/lora.py CONFIG_DEFAULTS (mlx-lm 0.32).  The command line seeds right before the adapters are built, adapts every
# linear layer of the last 16, and passes Adam nothing but a learning rate: no bias correction, no decay, no clipping.
_MLX_LM: Final[dict[str, dict[str, Any]]] = {
    "model": {"dtype": "checkpoint"},
    "data": {"batching": "library"},
    "lora": {"rank": 8, "dropout": 0.0, "targets": "linear", "layers": 16},
    "train": {"steps": 1000, "batch": 4, "accumulation": 1, "seed": 0, "seed_at": "after-load"},
    "optimizer": {
        "name": "adam",
        "lr": 1e-5,
        "schedule": "constant",
        "warmup": 0,
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "bias_correction": False,
    },
    "clip": {"mode": "none"},
}
_MLX_LM_SCALE: Final = 20.0  # used as it is, where PEFT divides alpha by the rank

# transformers TrainingArguments (5.x) and peft LoraConfig: seeded by the script before anything is built, q_proj and
# v_proj of every layer (PEFT's table for llama and gemma3_text), global-norm clipping at 1.0, three epochs.
_PEFT: Final[dict[str, dict[str, Any]]] = {
    "model": {"dtype": "checkpoint"},
    "data": {"batching": "library"},
    "lora": {"rank": 8, "alpha": 8.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"], "layers": "all"},
    "train": {"batch": 8, "accumulation": 1, "seed": 42, "seed_at": "before-load"},
    "optimizer": {
        "name": "adamw",
        "lr": 5e-5,
        "schedule": "linear",
        "warmup": 0,
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "bias_correction": True,
    },
    "clip": {"mode": "norm", "value": 1.0},
}
_PEFT_EPOCHS: Final = 3
_ROWS: Final = 32  # of DataConfig

# TRL SFTConfig (trl 1.x) over the same: bfloat16 autocast, gradient checkpointing, a lower rate; it seeds before it adapts.
_TRL: Final[dict[str, dict[str, Any]]] = {
    "optimizer": {"lr": 2e-5},
    "train": {"autocast": "library", "checkpointing": "library"},
    "clip": {"mode": "library"},
}

# unsloth_zoo MLXTrainingConfig and get_peft_model (2026.10): warm-up of 5 steps, so a rate of 0 in the first; a decay of
# 0.001; the seven projections at rank 16; the loader casts to bfloat16 (float16 on an M1 or M2).
_UNSLOTH: Final[dict[str, dict[str, Any]]] = {
    "model": {"dtype": "library"},
    "data": {"batching": "library"},
    "lora": {"rank": 16, "alpha": 16.0, "dropout": 0.0, "layers": "all"},
    "train": {"steps": 60, "batch": 2, "accumulation": 4, "seed": 3407, "checkpointing": "library"},
    "optimizer": {
        "name": "adamw",
        "lr": 2e-4,
        "schedule": "linear",
        "warmup": 5,
        "weight_decay": 0.001,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "bias_correction": True,
    },
    "clip": {"mode": "library"},
}

Table = dict[str, dict[str, Any]]


def _mlx_lm(given: Mapping[str, Mapping[str, Any]]) -> Table:
    merged = _overlay(_MLX_LM, given)
    rank = merged["lora"]["rank"]
    if "alpha" not in merged["lora"] and type(rank) is int:
        merged["lora"]["alpha"] = _MLX_LM_SCALE * rank
    return merged


def _peft(given: Mapping[str, Mapping[str, Any]]) -> Table:
    merged = _overlay(_PEFT, given)
    train, rows = merged["train"], merged["data"].get("rows", _ROWS)
    sizes = (rows, train["batch"], train["accumulation"])
    if "steps" not in train and all(type(size) is int and size > 0 for size in sizes):
        train["steps"] = _PEFT_EPOCHS * math.ceil(rows / (train["batch"] * train["accumulation"]))
    return merged


def _trl(given: Mapping[str, Mapping[str, Any]]) -> Table:
    return _peft(_overlay(_TRL, given))


def _unsloth(given: Mapping[str, Mapping[str, Any]]) -> Table:
    return _overlay(_UNSLOTH, given)


def _plain(given: Mapping[str, Mapping[str, Any]]) -> Table:
    return _overlay({}, given)


DEFAULTS: Final[dict[str, Callable[[Mapping[str, Mapping[str, Any]]], Table]]] = {
    "plain": _plain,
    "mlx-lm": _mlx_lm,
    "peft": _peft,
    "trl": _trl,
    "unsloth": _unsloth,
}


def library_defaults(name: str, given: Mapping[str, Mapping[str, Any]]) -> Table:
    """`given` laid over the defaults called `name`; neither is changed."""
    return DEFAULTS[name](given)


def _overlay(base: Mapping[str, Mapping[str, Any]], over: Mapping[str, Mapping[str, Any]]) -> Table:
    return {section: {**base.get(section, {}), **over.get(section, {})} for section in {**base, **over}}
