"""Clean pairs: runs of the same training that differ in how it is computed only, and must not be called different.

Every group has one set of settings and the same runs of it: PyTorch, again with two threads, again with another implementation
of attention, HF Trainer, MLX eager, MLX compiled, mlx-lm's trainer, all from the adapters and batches of the first.  The other
optimizers of the libraries have a group each, of the runs in which they follow one rule.  Groups of INSIDE are
recorded with module outputs, losses of tokens and gradients of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from tests.bench.accuracy.arms import Arm


@dataclass(frozen=True)
class Clean:
    """One pair that agrees.  `noise`: the twins of either side, for `--noise`."""

    id: str
    kind: str
    group: str
    a: Arm
    b: Arm
    noise: tuple[Arm, ...]

    @property
    def arms(self) -> tuple[Arm, ...]:
        return (self.a, self.b, *self.noise)


_SHORT: Final[Mapping[str, Any]] = {"train.steps": 4}
_SMALL: Final[Mapping[str, Any]] = {"lora.rank": 4, "lora.targets": ["q_proj", "v_proj"]}

# transformers' own choice is sdpa.
ATTENTION: Final = "torch, sdpa / eager attention"

GROUPS: Final[dict[str, Mapping[str, Any]]] = {
    "defaults": {},
    **{f"seed {seed}": {"train.seed": seed, "data.seed": seed} for seed in (1, 2, 3)},
    "lr 2e-3, cosine": {"optimizer.lr": 2e-3, "optimizer.schedule": "cosine", "train.steps": 6},
    "lr 1e-4, warm-up": {"optimizer.lr": 1e-4, "optimizer.warmup": 2, "optimizer.schedule": "linear"},
    "weight decay": {"optimizer.weight_decay": 0.05},
    "sgd": {"optimizer.name": "sgd", "optimizer.lr": 0.1},
    "adam": {"optimizer.name": "adam"},
    "no bias correction": {"optimizer.bias_correction": False},
    "betas 0.8, 0.95, eps 1e-6": {"optimizer.betas": [0.8, 0.95], "optimizer.eps": 1e-6},
    "clip by norm": {"clip.mode": "norm", "clip.value": 0.1},
    "clip by value": {"clip.mode": "value", "clip.value": 0.01},
    "rows of 48, batch 4": {"data.row_length": 48, "train.batch": 4},
    "equal rows, batch 1": {"data.variable": False, "data.row_length": 16, "train.batch": 1},
    "accumulation": {"train.accumulation": 2, "data.variable": False},
    "rank 2, q and v": {"lora.rank": 2, "lora.targets": ["q_proj", "v_proj"]},
    "last 2 layers": {"lora.layers": 2},
    "bfloat16": {"model.dtype": "bfloat16"},
    "bfloat16, seed 4, lr 2e-3": {"model.dtype": "bfloat16", "train.seed": 4, "data.seed": 4, "optimizer.lr": 2e-3},
    "float16": {"model.dtype": "float16"},
    "gemma": {"model.name": "tiny-gemma3-64", **_SMALL},
}


# Groups that are recorded with the inside of each step: settings, and a plan for the batches that the first run gives the others.
INSIDE: Final[dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
    "inside": ({}, {}),
    "inside, seed 1": ({"train.seed": 1, "data.seed": 1}, {}),
    "inside, rows of 48, batch 4": ({"data.row_length": 48, "train.batch": 4}, {}),
    "inside, equal rows, batch 1": ({"data.variable": False, "data.row_length": 16, "train.batch": 1}, {}),
    "inside, 8 columns of padding": ({}, {"batch": [{"op": "wider", "by": 8}]}),
    "inside, rows of 160": ({"data.variable": False, "data.row_length": 160}, {}),
    "inside, accumulation": ({"train.accumulation": 2, "data.variable": False}, {}),
    "inside, lr 2e-3": ({"optimizer.lr": 2e-3, "train.steps": 6}, {}),
    "inside, bfloat16": ({"model.dtype": "bfloat16"}, {}),
    "inside, float16": ({"model.dtype": "float16"}, {}),
    "inside, gemma": ({"model.name": "tiny-gemma3-64", **_SMALL}, {}),
}


# Optimizer -> class and settings on either side, and whether both follow one rule: MLX's Adamax corrects no bias, its Muon
# iterates in float32.
OPTIMIZERS: Final[dict[str, tuple[Mapping[str, Any], bool]]] = {
    "rmsprop": ({"torch": ["RMSprop", {"lr": 1e-3}], "mlx": ["RMSprop", {"learning_rate": 1e-3}]}, True),
    "adagrad": (
        {"torch": ["Adagrad", {"lr": 1e-2, "eps": 1e-8}], "mlx": ["Adagrad", {"learning_rate": 1e-2, "eps": 1e-8}]},
        True,
    ),
    "adadelta": ({"torch": ["Adadelta", {"lr": 0.5}], "mlx": ["AdaDelta", {"learning_rate": 0.5}]}, True),
    "adafactor": (
        {
            "torch": ["transformers.Adafactor", {"lr": 1e-2, "relative_step": False}],
            "mlx": ["Adafactor", {"learning_rate": 1e-2, "relative_step": False}],
        },
        True,
    ),
    "adafactor, torch": ({"torch": ["Adafactor", {"lr": 1e-2}]}, False),
    "adamax": ({"torch": ["Adamax", {"lr": 1e-3}], "mlx": ["Adamax", {"learning_rate": 1e-3}]}, False),
    "nadam": ({"torch": ["NAdam", {"lr": 1e-3}]}, False),
    "radam": ({"torch": ["RAdam", {"lr": 1e-3}]}, False),
    "lion": ({"mlx": ["Lion", {"learning_rate": 1e-4}]}, False),
    "muon": ({"torch": ["Muon", {"lr": 1e-3}], "mlx": ["Muon", {"learning_rate": 1e-3}]}, False),
}


def all_clean() -> list[Clean]:
    """Every clean pair."""
    return [
        *(pair for name, settings in GROUPS.items() for pair in _group(name, Arm("torch", {**_SHORT, **settings}))),
        *(pair for name in OPTIMIZERS for pair in _optimizer(name)),
        *(
            pair
            for name, (settings, plan) in INSIDE.items()
            for pair in _group(name, Arm("torch", {**_SHORT, **settings}, plan, inside=True))
        ),
    ]


def _group(name: str, torch: Arm) -> Iterator[Clean]:
    settings = torch.settings

    def fed(path: str, **more: Any) -> Arm:
        return Arm(path, {**settings, **more}, source=torch, inside=torch.inside)

    eager, compiled = fed("mlx", **{"train.compile": False}), fed("mlx")
    other = {
        "torch / mlx eager": (torch, eager),
        "torch / mlx compiled": (torch, compiled),
        "mlx eager / compiled": (eager, compiled),
        "torch / hf-trainer": (torch, fed("hf-trainer")),
        "mlx / mlx-lm": (compiled, fed("mlx-lm")),
        "torch, 1 / 2 threads": (torch, replace(torch, threads=2)),
        ATTENTION: (torch, fed("torch", **{"model.attention": "eager"})),
    }
    for kind, (a, b) in other.items():
        if kind == "torch / hf-trainer" and not settings.get("optimizer.bias_correction", True):
            continue  # its own optimizer, which is the path's, not the library's
        yield Clean(f"{name}: {kind}", kind, name, a, b, _twins(a, b))


def _optimizer(name: str) -> Iterator[Clean]:
    """The runs of one of the libraries' other optimizers; adapters and batches are those of the first run."""
    library, alike = OPTIMIZERS[name]
    settings = {**_SHORT, **_SMALL}
    source = Arm("torch", settings)

    def run(path: str, **more: Any) -> Arm:
        return Arm(path, {**settings, **more}, {"library": library}, source)

    pairs: dict[str, tuple[Arm, Arm]] = {}
    if "torch" in library:
        pairs["torch, 1 / 2 threads"] = run("torch"), replace(run("torch"), threads=2)
        pairs[ATTENTION] = run("torch"), run("torch", **{"model.attention": "eager"})
    if "mlx" in library:
        pairs["mlx eager / compiled"] = run("mlx", **{"train.compile": False}), run("mlx")
    if alike:
        pairs["torch / mlx eager"] = run("torch"), run("mlx", **{"train.compile": False})
    for kind, (a, b) in pairs.items():
        yield Clean(f"{name}: {kind}", kind, name, a, b, _twins(a, b))


def _twins(a: Arm, b: Arm) -> tuple[Arm, ...]:
    """A rounding twin of each side, one where both sides are the same run on another number of threads."""
    found = {arm.key: arm for arm in (replace(side, twin=1, threads=1) for side in (a, b))}
    return tuple(found.values())
