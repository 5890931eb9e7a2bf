"""Which optimizers and models of the process belong to the run, and what their parameters are called.

An optimizer made while recording belongs to it; one that was there before may be left over from another run, and
counts from the first call of its model, or its own first update, on.  Optimizers and models are referred to weakly:
the recorder keeps none alive.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
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


@dataclass(frozen=True, slots=True)
class Call:
    """A module that is called, and what it is called with."""

    module: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


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
        # Parameters whose owner was looked for in vain, by id.
        self._sought: set[int] = set()

    def add(self, optimizer: Any) -> None:
        """An optimizer belongs to the run, and so do the models that it updates."""
        known = self._optimizers.get(id(optimizer))
        parameters = _its_own(optimizer)
        if not parameters or (known is not None and known() is optimizer):
            return
        self._forget(d for d in self._dormant if d.optimizer() is optimizer)
        self._optimizers = {key: ref for key, ref in self._optimizers.items() if ref() is not None}
        self._optimizers[id(optimizer)] = weakref.ref(optimizer)
        self._tracked = []
        owned = {id(p) for _, p in self._owned()}
        if any(id(p) not in owned for p in parameters):
            for root in ModuleGraph().roots(parameters):
                self._add_model(root)

    def watch(self, optimizers: Sequence[Any]) -> None:
        """These optimizers were there before; they may or may not belong to the run."""
        graph = ModuleGraph() if optimizers else None
        for optimizer in optimizers:
            roots = graph.roots(_its_own(optimizer)) if graph is not None else []
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
            owned = self._owned()
            unowned = self._unowned(owned)
            if any(id(p) not in self._sought for _, p in unowned):
                # A group that was added to an optimizer: the modules that own it belong to the run too.
                wanted = [p for _, p in unowned]
                for root in ModuleGraph().roots(wanted):
                    for part in self._apart(root, {id(p) for p in wanted}):
                        self._add_model(part)
                owned = self._owned()
                unowned = self._unowned(owned)
                self._sought = {id(p) for _, p in unowned}
            self._tracked = [(name, p) for name, p in owned if p.requires_grad] + unowned
        return self._tracked

    def _apart(self, module: Any, wanted: Set[int]) -> Iterator[Any]:
        """The outermost modules that own wanted parameters (by id) and hold none of the run's models, which stay as they are."""
        if not any(id(p) in wanted for p in module.parameters()):
            return
        inside = {id(one) for one in module.modules()}
        if not any(id(model.root) in inside for model in self.models):
            yield module
            return
        for child in module.children():
            yield from self._apart(child, wanted)

    def _owned(self) -> list[Named]:
        """The parameters of the models, each under the first of its names."""
        named: dict[int, Named] = {}
        for model in self.models:
            for name, parameter in model.parameters():
                named.setdefault(id(parameter), (name, parameter))
        return list(named.values())

    def _unowned(self, owned: Sequence[Named]) -> list[Named]:
        """Trainable parameters of the optimizers that no model owns, named by their places."""
        known = {id(p) for _, p in owned}
        named = []
        for i, optimizer in enumerate(self.live()):
            for j, parameter in enumerate(trainable(optimizer)):
                if id(parameter) not in known:
                    known.add(id(parameter))
                    named.append((f"optimizer{i}.parameter{j}", parameter))
        return named

    def without_model(self) -> list[Named]:
        """The trainable parameters that no model owns."""
        tracked = self.tracked()  # finds models, so it comes first
        owned = {id(p) for _, p in self._owned()}
        return [(name, p) for name, p in tracked if id(p) not in owned]

    def unheld(self) -> list[Named]:
        """The trainable parameters that no optimizer updates."""
        dormant = [optimizer for d in self._dormant if (optimizer := d.optimizer()) is not None]
        held = {id(p) for optimizer in [*self.live(), *dormant] for p in trainable(optimizer)}
        return [(name, p) for name, p in self.tracked() if id(p) not in held]

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

    def outermost(self, call: Call) -> Call:
        """The call of a model's root, or that of a module around it that has more to train, and takes its place.

        Such a module was made after the optimizer.  Names are settled once step 0 is recorded.
        """
        if self.settled:
            return call
        owned = {id(p) for _, p in self._owned()}
        for outer in _calls_around(call.module):
            if any(p.requires_grad and id(p) not in owned for p in outer.module.parameters()):
                self._add_model(outer.module)
                self._tracked = []
                return outer
        return call

    def _forget(self, dormant: Iterable[_Dormant]) -> None:
        for one in list(dormant):
            self._dormant.remove(one)
            for _, hook in one.models:
                hook.remove()


def _its_own(optimizer: Any) -> list[Any]:
    """The parameters that an optimizer can update; if it can update none, those that it holds all the same."""
    return trainable(optimizer) or [p for group in optimizer.param_groups for p in group["params"]]


def _calls_around(module: Any) -> list[Call]:
    """Calls that are under way of modules that hold this one, the outermost first."""
    import torch

    code = torch.nn.Module._wrapped_call_impl.__code__
    found = []
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]
        if frame.f_code is not code:
            continue
        own = frame.f_locals
        outer = own["self"]
        if outer is not module and any(inside is module for inside in outer.modules()):
            found.append(Call(outer, own["args"], own["kwargs"]))
    return found[::-1]
