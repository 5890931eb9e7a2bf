"""Hooks into trainers over MLX: mlx-lm's `train`, unsloth's MLXTrainer.

Of a trainer only two things are wanted that MLX itself does not show: the arguments as it got them, whatever a
configuration file said, and clip functions of its own.  Nothing of unsloth is imported; its module is hooked when the program
imports it, and a name that a version does not have is left alone.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Final

from tracer.backends.mlx_arrays import flatten
from tracer.backends.mlx_events import Clip, ClipCall, Scope
from tracer.backends.mlx_model import observe_settings, observe_trainer
from tracer.backends.mlx_patch import Patches
from tracer.recorder import Recorder

Function = Callable[..., Any]

# unsloth's clip functions of (gradients, bound), and how they clip.  Its clip by value goes through mx.clip.
UNSLOTH_CLIPS: Final = {"_clip_grad_by_leaf_norm": "tensor", "_clip_grad_norm_fp32": "norm"}


def hook_mlx_lm(patches: Patches, recorder: Recorder) -> None:
    """Note the arguments that mlx-lm's `train` gets."""
    trainer = sys.modules.get("mlx_lm.tuner.trainer")
    if trainer is not None:
        patches.attribute(trainer, "train", lambda original: _train(original, recorder))


def _train(original: Function, recorder: Recorder) -> Function:
    @functools.wraps(original)
    def train(*args: Any, **kwargs: Any) -> Any:
        with recorder.guard():
            observe_trainer(recorder, original, args, kwargs)
        return original(*args, **kwargs)

    return train


def hook_unsloth(patches: Patches, recorder: Recorder, scope: Callable[[], Scope | None]) -> None:
    """Note MLXTrainer's arguments, and what its clip functions do; `scope`: where clips go now, None for nowhere."""
    module = sys.modules["unsloth_zoo.mlx.trainer"]
    trainer = getattr(module, "MLXTrainer", None)
    if trainer is not None:
        patches.attribute(trainer, "train", lambda original: _train_unsloth(original, recorder))
    for name, mode in UNSLOTH_CLIPS.items():
        if callable(getattr(module, name, None)):
            patches.attribute(module, name, functools.partial(_clip, mode=mode, recorder=recorder, scope=scope))


def _train_unsloth(original: Function, recorder: Recorder) -> Function:
    @functools.wraps(original)
    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        with recorder.guard():
            recorder.observe("trainer.class", type(trainer).__name__)
            observe_settings(recorder, trainer.args)
        return original(trainer, *args, **kwargs)

    return train


def _clip(original: Function, *, mode: str, recorder: Recorder, scope: Callable[[], Scope | None]) -> Function:
    @functools.wraps(original)
    def clip(gradients: Any, *args: Any, **kwargs: Any) -> Any:
        outcome = original(gradients, *args, **kwargs)
        if recorder.active:
            with recorder.guard():
                bound = next((float(v) for v in (*args, *kwargs.values()) if isinstance(v, (int, float))), None)
                clipped, norm = outcome if isinstance(outcome, tuple) else (outcome, None)
                if (into := scope()) is not None:
                    before = flatten(gradients)
                    into.clipped(before, flatten(clipped), Clip(mode, bound))
                    if norm is not None:
                        into.clip_calls.append(ClipCall(bound, before, norm))
        return outcome

    return clip
