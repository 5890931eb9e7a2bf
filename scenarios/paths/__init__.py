"""The training paths, one line each.  A path's module has `run(config, feed) -> Outcome` and is imported when it runs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast

from scenarios.config import RunConfig
from scenarios.feed import Feed
from scenarios.outcome import Outcome
from tracer.errors import BadUsage, PathUnavailable


class TrainingPath(Protocol):
    """Module of a path."""

    def run(self, config: RunConfig, feed: Feed) -> Outcome:
        """Train as configured; raises BadConfig for a setting that this path cannot honour."""


@dataclass(frozen=True, slots=True)
class PathInfo:
    """A registered path: where it lives, what it needs and the command that installs that.

    `own_batching`: its library can make the batches.  `base`: settings that hold on this path unless others are given.
    """

    name: str
    module: str
    needs: tuple[str, ...]
    summary: str
    fix: str
    own_batching: bool = False
    base: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def missing(self) -> tuple[str, ...]:
        """Packages that it needs and that are not installed; imports none of them."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)

    def load(self) -> TrainingPath:
        """The path's module; raises PathUnavailable."""
        missing = self.missing()
        if missing:
            raise PathUnavailable(f"path {self.name} needs {', '.join(missing)}", self.fix)
        return cast(TrainingPath, importlib.import_module(self.module))


_TORCH: Final = ("torch", "transformers", "peft", "safetensors", "tokenizers")
_MLX: Final = ("mlx", "mlx_lm", "safetensors", "tokenizers")
_INSTALL_TORCH: Final = "pip install 'steptrace[torch]'"
_INSTALL_MLX: Final = "pip install 'steptrace[mlx]'"
# unsloth_zoo wants older versions of transformers and trl than the newest: an environment of its own.
_INSTALL_UNSLOTH: Final = "make unsloth, then --python .venv-unsloth/bin/python"

PATHS: Final[dict[str, PathInfo]] = {
    info.name: info
    for info in (
        PathInfo("torch", "scenarios.paths.torch_loop", _TORCH, "plain PyTorch loop, PEFT", _INSTALL_TORCH),
        PathInfo(
            "hf-trainer",
            "scenarios.paths.hf_trainer",
            (*_TORCH, "accelerate"),
            "HF Trainer, PEFT",
            _INSTALL_TORCH,
            own_batching=True,
        ),
        PathInfo(
            "trl-sft",
            "scenarios.paths.trl_sft",
            (*_TORCH, "accelerate", "trl", "datasets"),
            "TRL SFTTrainer, PEFT",
            _INSTALL_TORCH,
            own_batching=True,
        ),
        PathInfo(
            "mlx-lm",
            "scenarios.paths.mlx_lm_train",
            _MLX,
            "mlx_lm.tuner.trainer.train()",
            _INSTALL_MLX,
            own_batching=True,
        ),
        PathInfo(
            "mlx-lm-cli",
            "scenarios.paths.mlx_lm_cli",
            _MLX,
            "python -m mlx_lm lora --config",
            _INSTALL_MLX,
            own_batching=True,
            base={"data": {"batching": "library"}},
        ),
        PathInfo("mlx", "scenarios.paths.mlx_loop", _MLX, "hand-written MLX loop, compiled or eager", _INSTALL_MLX),
        PathInfo(
            "unsloth-mlx",
            "scenarios.paths.unsloth_mlx",
            (*_MLX, "unsloth_zoo"),
            "FastMLXModel, get_peft_model, MLXTrainer",
            _INSTALL_UNSLOTH,
            own_batching=True,
        ),
    )
}


def path_info(name: str) -> PathInfo:
    """A path by name; raises BadUsage with the known names."""
    if name not in PATHS:
        raise BadUsage(f"there is no path called {name}", f"known are {', '.join(PATHS)}")
    return PATHS[name]


def installed_paths() -> tuple[str, ...]:
    """Names of the paths whose packages are installed."""
    return tuple(name for name, info in PATHS.items() if not info.missing())
