"""Outputs of the trained model's modules, seen while the loss function runs.

A module's `__call__` belongs to its class, so the classes that occur in the trained model are hooked, and a call is noted
only if the instance belongs to that model and the loss function is running: a second model of the same class, an evaluation
between two steps, and the second forward of gradient checkpointing, which runs after the loss function has returned, pass
unchanged.  Inside a compiled function the hooks see tracers and only keep them: what is noted leaves it as extra
outputs.  Invariant: hooks evaluate nothing and change nothing of the run's own graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from tracer.backends.mlx_arrays import Array
from tracer.backends.mlx_model import find
from tracer.backends.mlx_patch import Patches
from tracer.names import BASE_LAYER, LORA_DELTA, LORA_DROPOUT
from tracer.recorder import Recorder
from tracer.schema import Phase

Function = Callable[..., Any]

# What the per-token loss is made from: losses of tokens as the run computed them, or logits and targets, or logits alone.
TOKENS: Final = "tokens"
LOGITS: Final = "logits"
TARGETS: Final = "targets"
HEAD: Final = "lm_head"
# What a LoRA layer of mlx-lm calls the layer that it wraps.
WRAPPED: Final = ("linear", "embedding")


@dataclass(frozen=True, slots=True)
class Output:
    """An array that was computed on the way to the loss: canonical name, the library's own, the array."""

    name: str
    original: str
    array: Array


@dataclass(slots=True)
class Captured:
    """What one call of the loss function left: module outputs in call order, and what its tokens' losses are made from."""

    modules: list[Output] = field(default_factory=list)
    tokens: list[Output] = field(default_factory=list)
    running: set[tuple[int, str]] = field(default_factory=set)
    # Results of stop_gradient, by id; kept, so that an id stays its own.
    stopped: dict[int, Array] = field(default_factory=dict)
    # Names of embeddings whose record is the first layer's input already.
    entered: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Known:
    """A module of the trained model.  `head`: name of what `as_linear` gives; `feeds`: the embedding before a first layer."""

    name: str
    path: str
    wanted: bool
    head: str = ""
    feeds: tuple[str, str] | None = None


class Forward:
    """Hooks of the modules of the trained model, and of the cross-entropy in its loss."""

    def __init__(self, recorder: Recorder, patches: Patches) -> None:
        self._recorder = recorder
        self._patches = patches
        self._modules = Phase.FORWARD in recorder.options.what
        self._tokens = recorder.options.token_loss and Phase.LOSS in recorder.options.what
        self._model: Any = None  # keeps the ids below its own
        self._known: dict[int, _Known] = {}
        self._armed = False
        self._open: Captured | None = None
        self._last: Captured | None = None

    @property
    def wanted(self) -> bool:
        """Whether anything in here is to be recorded; otherwise nothing is hooked."""
        return self._modules or self._tokens

    def hook_losses(self, losses: Any) -> None:
        """Hook `mlx.nn.losses`."""
        if self._tokens:
            self._patches.attribute(losses, "cross_entropy", self._cross_entropy)

    def hook_core(self, core: Any) -> None:
        """Hook `mlx.core`."""
        if self.wanted:
            self._patches.attribute(core, "stop_gradient", self._stop_gradient)

    def watching(self, loss: Function) -> Function:
        """The function to be differentiated; its next call after `begin` is looked into, later ones are recomputation."""
        if not self.wanted:
            return loss

        @functools.wraps(loss)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._armed:
                return loss(*args, **kwargs)
            self._armed, self._open = False, Captured()
            try:
                return loss(*args, **kwargs)
            finally:
                self._last, self._open = self._open, None

        return call

    def begin(self, model: Any, loss: Any) -> None:
        """Gradients are about to be taken: hook the modules that the model has now, or that of the loss function."""
        if not self.wanted:
            return
        import mlx.nn as nn

        self._last = None
        model = model if model is not None else find(loss, nn.Module)
        if model is not None:
            self._attach(model)
        self._armed = True

    def take(self) -> Captured:
        """What the loss function that was watched left; nothing if it was not called."""
        self._armed = False
        captured, self._last = self._last, None
        return captured or Captured()

    def _attach(self, model: Any) -> None:
        modules = dict(model.named_modules())
        self._model, self._known = model, {}
        for path, module in modules.items():
            known = self._describe(path, module, modules)
            # A module that is held in two places is named by the first of them, in the order of definition.
            self._known.setdefault(id(module), known)
            self._patches.method(type(module), "__call__", self._calling)
            if known.head:
                self._patches.method(type(module), "as_linear", self._heading)

    def _describe(self, path: str, module: Any, modules: dict[str, Any]) -> _Known:
        parent, _, last = path.rpartition(".")
        name = self._recorder.names(path).name
        if last in WRAPPED and "lora_a" in modules.get(parent, ()):
            name = self._recorder.names(parent).name + BASE_LAYER
            around = name.removesuffix(BASE_LAYER)
        else:
            around = name
        asked = {name, around + LORA_DELTA} if "lora_a" in module or around != name else {name}
        wanted = self._modules and bool(path) and any(self._recorder.wants_module(each) for each in asked)
        # mlx-lm has a dropout in every LoRA layer; with a rate of 0 it is none.
        wanted = wanted and not (name.endswith(LORA_DROPOUT) and getattr(module, "_p_1", 1) == 1)
        head = _head(path) if callable(getattr(type(module), "as_linear", None)) else ""
        return _Known(name, path, wanted, head, self._fed_by(path, modules))

    def _fed_by(self, path: str, modules: dict[str, Any]) -> tuple[str, str] | None:
        """Name and path of the embedding whose output, scaled, is what this first layer gets; None for other modules."""
        prefix = path.removesuffix("layers.0")
        embedding = f"{prefix}embed_tokens"
        name = self._recorder.names(embedding).name
        fed = prefix != path and embedding in modules and self._modules and self._recorder.wants_module(name)
        return (name, embedding) if fed else None

    # Calls.

    def _calling(self, original: Function) -> Function:
        @functools.wraps(original)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            captured, known = self._open, self._known.get(id(module))
            if captured is None or known is None or (id(module), "") in captured.running:
                return original(module, *args, **kwargs)
            if known.feeds is not None:
                with self._recorder.guard():
                    _entered(captured, known.feeds, [*args, *kwargs.values()])
            with _running(captured, (id(module), "")):
                output = original(module, *args, **kwargs)
            with self._recorder.guard():
                self._called(captured, known, output)
            return output

        return call

    def _called(self, captured: Captured, known: _Known, output: Any) -> None:
        array = _output(captured, output)
        if array is None:
            return
        if known.wanted:
            captured.modules.append(Output(known.name, known.path, array))
        if not known.path and self._tokens:
            captured.tokens.append(Output(LOGITS, "", array))

    def _heading(self, original: Function) -> Function:
        """`as_linear` of an embedding that is the head too."""

        @functools.wraps(original)
        def as_linear(module: Any, *args: Any, **kwargs: Any) -> Any:
            captured, known = self._open, self._known.get(id(module))
            if captured is None or known is None or any(how == "head" for _, how in captured.running):
                return original(module, *args, **kwargs)
            with _running(captured, (id(module), "head")):
                output = original(module, *args, **kwargs)
            with self._recorder.guard():
                name, array = self._recorder.names(known.head).name, _output(captured, output)
                if array is not None and self._modules and self._recorder.wants_module(name):
                    captured.modules.append(Output(name, f"{known.path}.as_linear", array))
            return output

        return as_linear

    def _stop_gradient(self, original: Function) -> Function:
        @functools.wraps(original)
        def stop_gradient(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._open is not None:
                self._open.stopped[id(result)] = result
            return result

        return stop_gradient

    def _cross_entropy(self, original: Function) -> Function:
        @functools.wraps(original)
        def cross_entropy(logits: Any, targets: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(logits, targets, *args, **kwargs)
            if self._open is not None:
                with self._recorder.guard():
                    self._open.tokens.extend(_losses(logits, targets, result, args, kwargs))
            return result

        return cross_entropy


@contextmanager
def _running(captured: Captured, call: tuple[int, str]) -> Iterator[None]:
    """A call of a module is one, however many of its classes' methods it goes through."""
    captured.running.add(call)
    try:
        yield
    finally:
        captured.running.discard(call)


def _entered(captured: Captured, embedding: tuple[str, str], arguments: list[Any]) -> None:
    """The first layer is called: what it gets is the embedding's record, in the place where the embedding was called.

    mlx-lm scales Gemma's embeddings between the two modules, transformers inside the first.
    """
    array = next((found for argument in arguments if (found := _tensor(argument)) is not None), None)
    if array is None:
        return
    name, path = embedding
    output = Output(name, path, array)
    places = [i for i, known in enumerate(captured.modules) if known.name == name and i not in captured.entered]
    if places:
        captured.modules[places[-1]] = output
        captured.entered.add(places[-1])
    else:
        captured.entered.add(len(captured.modules))
        captured.modules.append(output)


def _losses(logits: Any, targets: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Output]:
    """What the losses of the tokens are made from: the run's own values where it did not weigh, smooth or reduce them."""
    names = ("weights", "axis", "label_smoothing", "reduction")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if targets.ndim != logits.ndim - 1 or given.get("axis", -1) not in (-1, logits.ndim - 1):
        return
    if given.get("weights") is None and not given.get("label_smoothing") and given.get("reduction", "none") == "none":
        yield Output(TOKENS, "", result)
    else:
        yield Output(LOGITS, "", logits)
        yield Output(TARGETS, "", targets)


def _head(path: str) -> str:
    """Name of the head that an embedding is tied to: it stands beside the model that holds the embedding."""
    prefix, found, _ = path.rpartition("model.embed_tokens")
    return f"{prefix if found else ''}{HEAD}"


def _output(captured: Captured, value: Any) -> Array | None:
    """What to keep of a module's output.

    mx.compile (0.32.4) fails on a stop_gradient as an output when what is below it occurs twice in the graph and nothing else
    uses it (IndexError: _Map_base::at); a product of its own, with the same bits, is no such output.
    """
    array = _tensor(value)
    return array * 1 if array is not None and id(array) in captured.stopped else array


def _tensor(value: Any) -> Array | None:
    """An array of three dimensions, or a tuple's first one."""
    import mlx.core as mx

    each = value if isinstance(value, (tuple, list)) else (value,)
    return next((item for item in each if isinstance(item, mx.array) and item.ndim == 3), None)
