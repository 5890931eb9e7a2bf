"""MLX, hooked from outside: `mx.compile`, value_and_grad, apply_gradients, clips, mlx-lm's `train`.

A Python hook inside a compiled function runs only while it is traced.  There the hooks put tracers on a tape, the tape's
arrays leave the function as extra outputs, and the caller gets the function's own result; in an eager loop the same
hooks see live arrays.  Hooks never evaluate anything while a function is traced, never draw a random number,
and let every exception of the run pass unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FunctionType
from typing import Any, Final

from tracer.backends.mlx_arrays import Array, Tree, evaluate, flatten
from tracer.backends.mlx_events import (
    Clip,
    ClipCall,
    Event,
    MicroBatch,
    Scope,
    Tape,
    loss_arguments,
    micro_batch_event,
)
from tracer.backends.mlx_forward import Forward
from tracer.backends.mlx_model import Snapshot, find, perturb, snapshot, training_mode
from tracer.backends.mlx_patch import Patches, cell_of, functions_with_code, inner_code
from tracer.backends.mlx_step import Collector
from tracer.backends.mlx_trainers import hook_mlx_lm, hook_unsloth
from tracer.modes import Mode
from tracer.recorder import Recorder

Function = Callable[..., Any]

# Functions made by a hooked value_and_grad carry this, so that `mx.compile(value_and_grad(f))` is recognised.
MARK: Final = "_takes_gradients"


class Backend:
    """Hooks of MLX."""

    name = "mlx"

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._collector = Collector(recorder)
        self._patches = Patches()
        self._forward = Forward(recorder, self._patches)
        self._eager = Scope()
        self._frame: Scope | None = None  # the compiled function that is being traced
        self._plans: dict[str, tuple[Event, ...]] = {}
        self._differentiating = 0
        self._updating: list[tuple[Any, tuple[str, ...]]] | None = None
        self._model: Any = None

    def triggers(self) -> Mapping[str, Callable[[], None]]:
        """What to hook once the program has imported it."""
        return {
            "mlx.core": self._hook_core,
            "mlx.nn": self._hook_nn,
            "mlx.optimizers": self._hook_optimizers,
            "mlx_lm.tuner.trainer": self._hook_mlx_lm,
            "mlx_lm.lora": self._hook_mlx_lm,
            "unsloth_zoo.mlx.trainer": self._hook_unsloth,
        }

    def uninstall(self) -> None:
        """Take every hook back."""
        self._patches.undo()

    # Hooks, by module.

    def _hook_core(self) -> None:
        import mlx.core as mx

        self._patches.attribute(mx, "compile", self._compile)
        self._patches.attribute(mx, "value_and_grad", self._core_value_and_grad)
        self._patches.attribute(mx, "clip", self._clip)
        self._forward.hook_core(mx)

    def _hook_nn(self) -> None:
        import mlx.nn as nn

        original: FunctionType = nn.utils.value_and_grad
        self._patches.attribute(nn.utils, "value_and_grad", self._nn_value_and_grad)
        self._patches.attribute(nn, "value_and_grad", self._nn_value_and_grad)
        self._forward.hook_losses(nn.losses)
        self._hook_made_before(original)

    def _hook_made_before(self, original: FunctionType) -> None:
        """Functions that nn.value_and_grad made before recording began: hook what they call."""
        code = inner_code(original, "wrapped_value_grad_fn") if isinstance(original, FunctionType) else None
        for function in list(functions_with_code(code)) if code is not None else ():
            inner, model = cell_of(function, "value_grad_fn"), cell_of(function, "model")
            if inner is not None and model is not None:
                loss = getattr(function, "__wrapped__", None)
                watched = self._watched(inner.cell_contents, loss, model.cell_contents, skip=1)
                self._patches.cell(inner, watched)
        code = inner_code(original, "inner_fn") if isinstance(original, FunctionType) else None
        for function in list(functions_with_code(code)) if code is not None else ():
            if (cell := cell_of(function, "fn")) is not None:
                self._patches.cell(cell, self._forward.watching(cell.cell_contents))

    def _hook_optimizers(self) -> None:
        import mlx.optimizers as optim

        self._patches.attribute(optim.Optimizer, "apply_gradients", self._apply_gradients)
        self._patches.attribute(optim.MultiOptimizer, "apply_gradients", self._apply_gradients)
        self._patches.attribute(optim.optimizers, "clip_grad_norm", self._clip_grad_norm)
        self._patches.attribute(optim, "clip_grad_norm", self._clip_grad_norm)

    def _hook_mlx_lm(self) -> None:
        hook_mlx_lm(self._patches, self._recorder)

    def _hook_unsloth(self) -> None:
        hook_unsloth(self._patches, self._recorder, lambda: None if self._differentiating else self._scope)

    # Compiled functions.

    def _compile(self, original: Function) -> Function:
        @functools.wraps(original)
        def compile(fun: Any, inputs: Any = None, outputs: Any = None, shapeless: bool = False, **more: Any) -> Any:
            # Without captured state a function cannot be a train step, unless it was made to take gradients.
            if not self._recorder.active or (inputs is None and outputs is None and not hasattr(fun, MARK)):
                return original(fun, inputs, outputs, shapeless, **more)
            compiled = original(self._tracing(fun), inputs, outputs, shapeless, **more)
            return self._calling(fun, compiled)

        return compile

    def _tracing(self, fun: Function) -> Function:
        """The function as it is traced: its result, and beside it what the hooks put on the tape."""

        @functools.wraps(fun)
        def traced(*args: Any, **kwargs: Any) -> Any:
            outer, self._frame = self._frame, (frame := Scope())
            try:
                result = fun(*args, **kwargs)
            finally:
                self._frame = outer
            return result, {self._plan(tuple(frame.events)): frame.tape.arrays}

        return traced

    def _plan(self, events: tuple[Event, ...]) -> str:
        """Key of a trace's events; where MLX does not compile, a function is "traced" at every call, alike."""
        key = next((key for key, known in self._plans.items() if known == events), str(len(self._plans)))
        self._plans[key] = events
        return key

    def _calling(self, fun: Function, compiled: Function) -> Function:
        """The compiled function as the program calls it: its own result, the extra outputs recorded."""

        @functools.wraps(fun)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = None
            if self._frame is None and self._recorder.active:
                with self._recorder.guard():
                    start = self._snapshot(fun)
            result, extra = compiled(*args, **kwargs)
            if self._recorder.active:
                with self._recorder.guard():
                    self._called(start, result, extra)
            return result

        return call

    def _snapshot(self, fun: Any = None, model: Any = None, trained: Tree = None) -> Snapshot:
        """State before a step; of the parameters, only until training has begun."""
        if not self._collector.needs_start:
            return snapshot(None, {}, None)
        import mlx.nn as nn
        import mlx.optimizers as optim

        model = model or self._model or (find(fun, nn.Module) if fun is not None else None)
        self._perturb(model)
        return snapshot(model, trained or {}, find(fun, optim.Optimizer) if fun is not None else None)

    def _perturb(self, model: Any) -> None:
        """Make this run the twin that it is asked to be, once, before its first step is executed."""
        twin = self._recorder.options.twin
        if twin is not None and twin.seed is not None and model is not None and not self._collector.perturbed:
            self._collector.perturbed = perturb(model, twin, self._recorder.names)

    def _called(self, start: Snapshot | None, result: Any, extra: Mapping[str, list[Array]]) -> None:
        for plan, values in extra.items():
            events = self._plans[plan]
            if self._frame is not None:
                _adopt(self._frame, events, values)
            elif events:
                self._begin(start)
                self._take(events, values, result)

    def _take(self, events: tuple[Event, ...], values: list[Array], result: Any) -> None:
        import mlx.core as mx

        # One evaluation for the program's outputs and ours, as the program itself would do next.  An array without a
        # value (seen while something was traced) is dealt with record by record.
        with suppress(ValueError, RuntimeError):
            mx.eval(result, values)
        for event in events:
            if isinstance(event, MicroBatch):
                self._collector.micro_batch(event, values)
            else:
                self._collector.update(event, values, compiled=True)

    def _begin(self, start: Snapshot | None) -> None:
        """A step begins with its first micro-batch: keep the generator's key and, once, the state before training."""
        if start is None or self._collector.pending:
            return
        self._collector.rng = start.rng
        if self._collector.needs_start:
            self._collector.start = start

    # Gradients.

    def _nn_value_and_grad(self, original: Function) -> Function:
        @functools.wraps(original)
        def value_and_grad(model: Any, fn: Any) -> Any:
            self._model = model
            return self._watched(original(model, fn), fn, model)

        return value_and_grad

    def _core_value_and_grad(self, original: Function) -> Function:
        @functools.wraps(original)
        def value_and_grad(fun: Any, argnums: Any = None, *args: Any, **kwargs: Any) -> Any:
            taken = original(self._forward.watching(fun), argnums, *args, **kwargs)
            return self._watched(taken, fun, None, argnums=_positions(argnums, kwargs))

        return value_and_grad

    def _watched(
        self, taken: Function, loss: Any, model: Any, *, skip: int = 0, argnums: frozenset[int] = frozenset()
    ) -> Function:
        """A value_and_grad function that reports its calls.  `skip`: leading arguments that the loss does not get."""

        @functools.wraps(taken)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._differentiating or not self._recorder.active:
                return taken(*args, **kwargs)
            start = None
            if self._frame is None and not self._collector.pending:
                with self._recorder.guard():
                    trained = args[min(argnums)] if argnums and min(argnums) < len(args) else None
                    start = self._snapshot(loss, model, trained)
            mode = None
            with self._recorder.guard():
                self._forward.begin(model or self._model, loss)
                mode = training_mode(model or self._model, loss)
            self._differentiating += 1
            try:
                outcome = taken(*args, **kwargs)
            finally:
                self._differentiating -= 1
            with self._recorder.guard():
                arguments = loss_arguments(loss, args[skip:], kwargs, argnums)
                self._gradients_taken(start, arguments, outcome, mode)
            return outcome

        setattr(call, MARK, True)
        return call

    def _gradients_taken(
        self,
        start: Snapshot | None,
        arguments: list[tuple[str, str, Array]],
        outcome: tuple[Any, Tree],
        mode: Mode | None,
    ) -> None:
        value, gradients = outcome
        scope = self._scope
        # The raw gradient is needed only where it is the step's only one, or is recorded by itself.
        alone = not self._collector.pending and not any(isinstance(e, MicroBatch) for e in scope.events)
        raw = flatten(gradients) if alone or self._recorder.options.micro_grads else {}
        event = micro_batch_event(scope.tape, arguments, value, raw, self._forward.take(), mode)
        if self._frame is not None:
            scope.events.append(event)
            return
        self._begin(start)
        self._collector.micro_batch(event, scope.tape.arrays)
        scope.tape = Tape()

    # Clips.

    def _clip(self, original: Function) -> Function:
        @functools.wraps(original)
        def clip(a: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(a, *args, **kwargs)
            if self._between:
                with self._recorder.guard():
                    high = args[1] if len(args) > 1 else kwargs.get("a_max")
                    self._scope.clipped({"": a}, {"": result}, Clip("value", _constant(high)))
            return result

        return clip

    def _clip_grad_norm(self, original: Function) -> Function:
        @functools.wraps(original)
        def clip_grad_norm(grads: Any, max_norm: Any) -> Any:
            outcome = original(grads, max_norm)
            if self._recorder.active and not self._differentiating:
                with self._recorder.guard():
                    before, bound = flatten(grads), _constant(max_norm)
                    self._scope.clipped(before, flatten(outcome[0]), Clip("norm", bound))
                    self._scope.clip_calls.append(ClipCall(bound, before, outcome[1]))
            return outcome

        return clip_grad_norm

    @property
    def _scope(self) -> Scope:
        return self._eager if self._frame is None else self._frame

    @property
    def _between(self) -> bool:
        """Whether gradients have been taken and not been applied yet, and nothing is differentiated or applied now."""
        if self._differentiating or self._updating is not None or not self._recorder.active:
            return False
        return bool(self._collector.pending or (self._frame is not None and self._frame.events))

    # Updates.

    def _apply_gradients(self, original: Function) -> Function:
        @functools.wraps(original)
        def apply_gradients(optimizer: Any, gradients: Any, parameters: Any) -> Any:
            if self._updating is not None:
                # An optimizer inside a MultiOptimizer.
                self._updating.append((optimizer, tuple(flatten(gradients))))
                return original(optimizer, gradients, parameters)
            if not self._recorder.active:
                return original(optimizer, gradients, parameters)
            with self._recorder.guard():
                self._before_update(optimizer, parameters)
            inner: list[tuple[Any, tuple[str, ...]]] = []
            self._updating = inner
            try:
                new = original(optimizer, gradients, parameters)
            finally:
                self._updating = None
            with self._recorder.guard():
                self._updated(optimizer, gradients, new, inner)
            return new

        return apply_gradients

    def _before_update(self, optimizer: Any, parameters: Any) -> None:
        """In an eager loop the optimizer is known only now: its state before the first step, if it was resumed."""
        if self._frame is not None:
            return
        start = self._collector.start
        # Parameters that were seen only while a function was being traced have no values; these have.
        traced = start is not None and not evaluate(start.parameters.values())
        if self._collector.needs_start or traced:
            import mlx.nn as nn

            model = parameters if isinstance(parameters, nn.Module) else None
            self._perturb(model)
            start = snapshot(model, parameters if model is None else None, optimizer)
        if start is not None and start.optimizer is None:
            start = dataclasses.replace(start, optimizer=optimizer, state=flatten(optimizer.state))
        self._collector.start = start

    def _updated(self, optimizer: Any, gradients: Tree, new: Tree, inner: list[tuple[Any, tuple[str, ...]]]) -> None:
        scope, applied = self._scope, flatten(gradients)
        # An optimizer without parameters has no group.
        parts = [(child, names) for child, names in inner if names] or [(optimizer, tuple(applied))]
        event = scope.update(parts, applied, new)
        if self._frame is None:
            values, self._eager = scope.tape.arrays, Scope()
            self._collector.update(event, values, compiled=False)


def _adopt(frame: Scope, events: tuple[Event, ...], values: list[Array]) -> None:
    """Events of a compiled function that was called while another was being traced: they leave through that one."""

    def move(slot: int) -> int:
        return frame.tape.put(values[slot])

    frame.events.extend(event.moved(move) for event in events)


def _positions(argnums: Any, kwargs: Mapping[str, Any]) -> frozenset[int]:
    """Positions of the arguments that mx.value_and_grad differentiates."""
    if argnums is None:
        return frozenset() if kwargs.get("argnames") else frozenset({0})
    return frozenset({argnums} if isinstance(argnums, int) else argnums)


def _constant(bound: Any) -> float | None:
    return float(bound) if isinstance(bound, (int, float)) else None
