"""Hooks into PyTorch, and into the transformers Trainer if the program uses it; no training code is changed.

What is wrapped: construction and step of optimizers (torch's own global hooks), backward, the clip functions,
cross_entropy, GradScaler, torch.compile, and the forward of the model that an optimizer updates.  Each wrapper calls the original
exactly once with the arguments it was given, outside the recorder's guard.  Nothing is imported that the program did
not import, and `uninstall` puts everything back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import repeat
from operator import is_
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from tracer.backends.pytorch_model import is_sharded, live_optimizers
from tracer.backends.pytorch_registry import Registry
from tracer.backends.pytorch_run import Run

if TYPE_CHECKING:
    from tracer.recorder import Recorder

Function = Callable[..., Any]

# Names in torch.nn.utils.clip_grad -> how it clips.  The private one does the work of `clip_grad_norm_` since torch
# 2.6, also for a program that took hold of that function before recording began.
CLIP_FUNCTIONS: Final = {"clip_grad_norm_": "norm", "clip_grad_value_": "value", "_clip_grads_with_norm_": "norm"}

# Arguments of a Trainer that name places, accounts or the moment, not the training.
PRIVATE_PREFIXES: Final = ("hub_", "push_to_hub", "resume_from", "report_to", "run_name", "project", "trackio_")
PRIVATE_SUFFIXES: Final = ("_dir", "_path", "_token")


class Backend:
    """PyTorch, as one recording sees it."""

    name = "pytorch"

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._registry = Registry(self._hook_forward)
        self._run = Run(recorder, self._registry)
        self._restore: list[Callable[[], None]] = []
        self._backward_depth = 0
        self._clip_depth = 0

    def triggers(self) -> Mapping[str, Callable[[], None]]:
        """What to hook once the program has imported it."""
        return {"torch": self._install, "transformers.trainer": self._install_trainer}

    def uninstall(self) -> None:
        """End the step under way and take every hook back, the last first."""
        with self._recorder.guard():
            self._run.finish()
        with self._recorder.guard():
            self._registry.close()
        while self._restore:
            with contextlib.suppress(Exception):
                self._restore.pop()()

    # Installing.

    def _install(self) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        self._restore.append(register_optimizer_step_pre_hook(self._before_update).remove)
        self._restore.append(register_optimizer_step_post_hook(self._after_update).remove)
        self._patch(torch.optim.Optimizer, "__init__", self._wrap_construction)
        self._patch(torch.Tensor, "backward", self._wrap_backward)
        self._patch(torch.autograd, "backward", self._wrap_backward)
        self._patch(torch.nn.functional, "cross_entropy", self._wrap_cross_entropy)
        self._patch(torch.amp.GradScaler, "scale", self._wrap_scale)
        self._patch(torch.amp.GradScaler, "step", self._wrap_scaler_step)
        self._patch(torch, "compile", self._wrap_compile)
        for name, mode in CLIP_FUNCTIONS.items():
            original = getattr(torch.nn.utils.clip_grad, name, None)
            if original is not None:
                self._replace_everywhere(original, self._wrap_clip(original, mode))
        self._registry.watch(live_optimizers())

    def _install_trainer(self) -> None:
        trainer = sys.modules["transformers.trainer"].Trainer
        self._patch(trainer, "train", self._wrap_train)
        self._patch(trainer, "training_step", self._wrap_training_step)

    def _patch(self, owner: Any, name: str, wrap: Callable[[Function], Function]) -> None:
        """Replace an attribute by a wrapper of it, unless somebody else has replaced ours when we leave."""
        original = getattr(owner, name)
        wrapper = wrap(original)
        setattr(owner, name, wrapper)

        def restore() -> None:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)

        self._restore.append(restore)

    def _replace_everywhere(self, original: Function, wrapper: Function) -> None:
        """Replace a function in every module that has imported it by name."""
        _swap(original, wrapper)
        self._restore.append(lambda: _swap(wrapper, original))

    # Optimizers.

    def _wrap_construction(self, original: Function) -> Function:
        @functools.wraps(original)
        def construct(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            original(optimizer, *args, **kwargs)
            if self._recorder.active:
                with self._recorder.guard():
                    self._registry.add(optimizer)

        return construct

    def _before_update(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._recorder.active:
            with self._recorder.guard():
                self._registry.add(optimizer)
                self._run.update_begins(optimizer, closure=_has_closure(args, kwargs))

    def _after_update(self, optimizer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._recorder.active:
            with self._recorder.guard():
                self._run.update_ended(optimizer, closure=_has_closure(args, kwargs))

    # Forward and backward.

    def _hook_forward(self, module: Any) -> Any:
        # `fully_shard` gathers parameters in a hook of its own; before that they are what the optimizer updates.
        return module.register_forward_pre_hook(
            ForwardHook(self._recorder, self._run), prepend=is_sharded(module), with_kwargs=True
        )

    def _wrap_backward(self, original: Function) -> Function:
        @functools.wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            # A backward inside a backward (Tensor.backward calls torch.autograd.backward, checkpoints call it again) is
            # part of the outer one.
            if _compiling() or self._backward_depth or not self._recorder.active:
                return original(tensors, *args, **kwargs)
            weights = args[0] if args else kwargs.get("gradient", kwargs.get("grad_tensors"))
            with self._recorder.guard():
                self._run.backward_begins(tensors, weights)
            failed = True
            self._backward_depth += 1
            try:
                result = original(tensors, *args, **kwargs)
                failed = False
            finally:
                self._backward_depth -= 1
                with self._recorder.guard():
                    self._run.backward_ended(failed=failed)
            return result

        return backward

    def _wrap_clip(self, original: Function, mode: str) -> Function:
        @functools.wraps(original)
        def clip(*args: Any, **kwargs: Any) -> Any:
            if _compiling() or self._clip_depth or not self._recorder.active:
                return original(*args, **kwargs)
            with self._recorder.guard():
                self._run.before_clip()
            self._clip_depth += 1
            try:
                norm = original(*args, **kwargs)
            finally:
                self._clip_depth -= 1
            with self._recorder.guard():
                limit = args[1] if len(args) > 1 else kwargs.get("max_norm", kwargs.get("clip_value", math.inf))
                given = args[2] if len(args) > 2 else kwargs.get("total_norm")
                tensors = args[0] if args else kwargs.get("parameters")
                norm_found = given if norm is None else norm
                self._run.clipped(mode, float(limit), norm_found, alone=_is_single(tensors))
            return norm

        return clip

    def _wrap_cross_entropy(self, original: Function) -> Function:
        @functools.wraps(original)
        def cross_entropy(*args: Any, **kwargs: Any) -> Any:
            if _compiling() or not self._recorder.active:
                return original(*args, **kwargs)
            result = original(*args, **kwargs)
            with self._recorder.guard():
                if result.requires_grad:
                    logits = args[0] if args else kwargs["input"]
                    target = args[1] if len(args) > 1 else kwargs["target"]
                    ignored = args[4] if len(args) > 4 else kwargs.get("ignore_index", -100)
                    self._run.cross_entropy(original, logits, target, ignored=int(ignored), whole=result.ndim == 0)
            return result

        return cross_entropy

    # Mixed precision and compilation.

    def _wrap_scale(self, original: Function) -> Function:
        @functools.wraps(original)
        def scale(scaler: Any, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if self._recorder.active and result is not outputs:
                with self._recorder.guard():
                    self._run.scaled(outputs, result, float(scaler.get_scale()))
            return result

        return scale

    def _wrap_scaler_step(self, original: Function) -> Function:
        @functools.wraps(original)
        def step(scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            before = self._run.updates
            result = original(scaler, optimizer, *args, **kwargs)
            if self._recorder.active and self._run.updates == before:
                with self._recorder.guard():
                    self._run.update_skipped()
            return result

        return step

    def _wrap_compile(self, original: Function) -> Function:
        @functools.wraps(original)
        def compile_(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            model = args[0] if args else kwargs.get("model")
            if self._recorder.active and hasattr(result, "register_forward_pre_hook"):
                with self._recorder.guard():
                    if self._registry.wrapped(model, result):
                        self._recorder.observe("compiled", True)
            return result

        return compile_

    # The transformers Trainer.

    def _wrap_train(self, original: Function) -> Function:
        @functools.wraps(original)
        def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if self._recorder.active:
                with self._recorder.guard():
                    self._recorder.observe("trainer.class", type(trainer).__name__)
                    for name, value in trainer_arguments(trainer.args):
                        self._recorder.observe(f"trainer.args.{name}", value)
            return original(trainer, *args, **kwargs)

        return train

    def _wrap_training_step(self, original: Function) -> Function:
        @functools.wraps(original)
        def training_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._run.inputs = dict(inputs) if isinstance(inputs, Mapping) else {}
            try:
                return original(trainer, model, inputs, *args, **kwargs)
            finally:
                self._run.inputs = {}

        return training_step


class ForwardHook:
    """Forward pre-hook of a root module.  A copy or a pickle of the module gets one that does nothing instead, so
    that what the program saves is what it would have saved."""

    def __init__(self, recorder: Recorder, run: Run) -> None:
        self._recorder = recorder
        self._run = run

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the call; changes nothing of it."""
        # First, so that a compiler that traces us sees an empty function.
        if _compiling():
            return
        import torch

        if self._recorder.active and torch.is_grad_enabled():
            with self._recorder.guard():
                self._run.forward(module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # It takes any arguments and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")


def trainer_arguments(arguments: Any) -> Iterator[tuple[str, object]]:
    """The effective arguments of a Trainer that are plain values and say nothing of the machine."""
    fields = dataclasses.fields(arguments) if dataclasses.is_dataclass(arguments) else ()
    for name in (field.name for field in fields):
        value = getattr(arguments, name, None)
        value = getattr(value, "value", value)  # an enum
        if name.startswith(PRIVATE_PREFIXES) or name.endswith(PRIVATE_SUFFIXES):
            continue
        if isinstance(value, str) and os.sep in value:
            continue
        if value is None or isinstance(value, bool | int | float | str):
            yield name, value


def _has_closure(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an optimizer's step was given a function to call; the first argument is the optimizer itself."""
    return any(callable(value) for value in (*args[1:], kwargs.get("closure")))


def _is_single(tensors: Any) -> bool:
    """Whether a clip function was given one tensor.  What can be looked at only once was not looked at."""
    return len(tensors) == 1 if isinstance(tensors, list | tuple) else hasattr(tensors, "element_size")


def _compiling() -> bool:
    """Whether torch.compile traces us now; it answers that itself, without running anything."""
    import torch

    return bool(torch.compiler.is_compiling())


def _swap(old: Function, new: Function) -> None:
    for module in list(sys.modules.values()):
        # Real modules only: a lazy one answers by importing.
        if not issubclass(type(module), ModuleType):
            continue
        # Thousands of modules, nearly none of which has it: those are passed over without a loop of Python's own.
        if not any(map(is_, list(vars(module).values()), repeat(old))):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
