"""Which optimizers and models of the process belong to the run, and what their parameters are called.

An optimizer made while recording belongs to it; one that was there before may be left over from another run, and
counts from the first call of its model, or its own first update, on.  Optimizers and models are referred to weakly:
the recorder keeps none alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tracer.backends.pytorch_model import Model, ModuleGraph, trainable

# A parameter under its original name.
Named = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class _Dormant:
    """An optimizer that has done nothing since recording began, and its models with the handles of their hooks."""

    optimizer: weakref.ref[Any]
    models: tuple[tuple[weakref.ref[Any], Any], ...]


class Registry:
    """The run's optimizers and models.  `hook_forward` hooks a root module and returns the hook's handle."""

    def __init__(self, hook_forward: Callable[[Any], Any]) -> None:
        self.models: list[Model] = []
        # Once step 0 is recorded, names are settled.
        self.settled = False
        self._hook_forward = hook_forward
        self._optimizers: dict[int, weakref.ref[Any]] = {}
        self._dormant: list[_Dormant] = []
        self._tracked: list[Named] = []

    def add(self, optimizer: Any) -> None:
        """An optimizer belongs to the run, and so do the models that it updates."""
        known = self._optimizers.get(id(optimizer))
        parameters = trainable(optimizer)
        if not parameters or (known is not None and known() is optimizer):
            return
        self._forget(d for d in self._dormant if d.optimizer() is optimizer)
        self._optimizers = {key: ref for key, ref in self._optimizers.items() if ref() is not None}
        self._optimizers[id(optimizer)] = weakref.ref(optimizer)
        self._tracked = []
        owned = {id(p) for model in self.models for _, p in model.parameters()}
        if any(id(p) not in owned for p in parameters):
            for root in ModuleGraph().roots(parameters):
                self._add_model(root)

    def watch(self, optimizers: Sequence[Any]) -> None:
        """These optimizers were there before; they may or may not belong to the run."""
        graph = ModuleGraph() if optimizers else None
        for optimizer in optimizers:
            roots = graph.roots(trainable(optimizer)) if graph is not None else []
            models = tuple((weakref.ref(root), self._hook_forward(root)) for root in roots)
            self._dormant.append(_Dormant(weakref.ref(optimizer), models))

    def called(self, module: Any) -> None:
        """A root module is called: optimizers that were there before and update it belong to the run."""
        woken = [d for d in self._dormant if any(ref() is module for ref, _ in d.models)]
        self._forget(woken)
        for dormant in woken:
            if (optimizer := dormant.optimizer()) is not None:
                self.add(optimizer)

    def wrapped(self, module: Any, wrapper: Any) -> bool:
        """torch.compile has put a wrapper around a module; returns whether that is a model of the run.

        A hook inside compiled code would be compiled with it, so it moves to the wrapper.
        """
        for i, model in enumerate(self.models):
            if model.root is module and wrapper is not module:
                model.hook.remove()
                self.models[i] = replace(model, hook=self._hook_forward(wrapper))
                return True
        return False

    def live(self) -> list[Any]:
        """The optimizers of the run that still exist."""
        return [optimizer for ref in self._optimizers.values() if (optimizer := ref()) is not None]

    def tracked(self) -> list[Named]:
        """Trainable parameters of the models, in their order, then those of optimizers that no module owns."""
        if not self._tracked:
            named = [(n, p) for model in self.models for n, p in model.parameters() if p.requires_grad]
            known = {id(p) for _, p in named}
            for i, optimizer in enumerate(self.live()):
                for j, parameter in enumerate(trainable(optimizer)):
                    if id(parameter) not in known:
                        known.add(id(parameter))
                        named.append((f"optimizer{i}.parameter{j}", parameter))
            self._tracked = named
        return self._tracked

    def named(self, optimizer: Any) -> list[Named]:
        """The parameters that an optimizer updates."""
        mine = {id(p) for p in trainable(optimizer)}
        return [(name, p) for name, p in self.tracked() if id(p) in mine]

    def step_ended(self) -> None:
        """Let go of the parameters; the next step asks again, since layers may be frozen or thawed in between."""
        self._tracked = []

    def close(self) -> None:
        """Take every hook back."""
        for model in self.models:
            model.hook.remove()
        self.models = []
        self._forget(self._dormant)

    def _add_model(self, root: Any) -> None:
        if not self.settled:
            # A module that wraps an earlier root takes its place: names are those of the outermost.
            inside = {id(module) for module in root.modules()}
            for model in [m for m in self.models if m.root is None or id(m.root) in inside]:
                model.hook.remove()
                self.models.remove(model)
        if not any(m.root is root for m in self.models):
            prefix = f"model{len(self.models)}." if self.models else ""
            self.models.append(Model(weakref.ref(root), prefix, self._hook_forward(root)))

    def _forget(self, dormant: Iterable[_Dormant]) -> None:
        for one in list(dormant):
            self._dormant.remove(one)
            for _, hook in one.models:
                hook.remove()
