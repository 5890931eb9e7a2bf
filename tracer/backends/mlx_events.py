"""What the hooks see, as events whose arrays are numbers of slots on a tape.

In an eager loop a tape holds live arrays.  Inside a compiled function the hooks run only while it is traced: there the
tape's arrays leave the function as extra outputs, and the same slots hold that call's values.  Invariant: an
event itself holds no array, so nothing that exists only while tracing can outlive it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tracer.backends.mlx_arrays import Array, Tree, flatten
from tracer.backends.mlx_forward import Captured, Output
from tracer.modes import Mode

Slots = dict[str, int]


class Tape:
    """Arrays, each in one slot however often it is put there."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self._slots: dict[int, int] = {}

    def put(self, array: Array) -> int:
        """Slot of an array.  The tape keeps it alive, so that its id stays its own."""
        slot = self._slots.get(id(array))
        if slot is None:
            slot = self._slots[id(array)] = len(self.arrays)
            self.arrays.append(array)
        return slot

    def put_all(self, arrays: Mapping[str, Array]) -> Slots:
        """Slots of named arrays."""
        return {name: self.put(array) for name, array in arrays.items()}


@dataclass(frozen=True, slots=True)
class ArgumentSlot:
    """An argument of the loss function: position, parameter name, slot."""

    position: str
    name: str
    slot: int


@dataclass(frozen=True, slots=True)
class OutputSlot:
    """An array that was computed on the way to the loss: canonical name, the library's own, slot."""

    name: str
    original: str
    slot: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One call of value_and_grad: arguments of the loss, its value, the token count beside it, raw gradients.

    `modules`: module outputs in call order.  `tokens`: what the losses of the tokens are made from.  `training`: the mode of the
    model's modules; a compiled function keeps the one that it was traced in.
    """

    arguments: tuple[ArgumentSlot, ...]
    loss: int | None
    count: int | None
    raw: Slots
    modules: tuple[OutputSlot, ...] = ()
    tokens: tuple[OutputSlot, ...] = ()
    training: Mode | None = None

    def moved(self, move: Callable[[int], int]) -> MicroBatch:
        """The same event with its slots on another tape."""
        return replace(
            self,
            arguments=tuple(replace(argument, slot=move(argument.slot)) for argument in self.arguments),
            loss=None if self.loss is None else move(self.loss),
            count=None if self.count is None else move(self.count),
            raw=_moved(self.raw, move),
            modules=tuple(replace(output, slot=move(output.slot)) for output in self.modules),
            tokens=tuple(replace(output, slot=move(output.slot)) for output in self.tokens),
        )


@dataclass(frozen=True, slots=True)
class Clip:
    """How gradients were clipped: `norm` or `value`, at which constant (None: not a constant), reported norm."""

    mode: str
    value: float | None
    norm: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """One optimizer of an update, the parameters that it holds, and its state after the update."""

    optimizer: Any
    names: tuple[str, ...]
    state: Slots


@dataclass(frozen=True, slots=True)
class Update:
    """One call of apply_gradients.

    `source`: the applied gradients before clipping, where that was seen.  `maybe_source`: the input of a clip_grad_norm
    whose output was transformed again; valid only if it was the only clip of the step.
    """

    parts: tuple[Part, ...]
    applied: Slots
    new: Slots
    source: Slots | None
    maybe_source: Slots | None
    clip: Clip | None

    def moved(self, move: Callable[[int], int]) -> Update:
        """The same event with its slots on another tape."""
        clip = self.clip
        if clip is not None and clip.norm is not None:
            clip = replace(clip, norm=move(clip.norm))
        return replace(
            self,
            parts=tuple(replace(part, state=_moved(part.state, move)) for part in self.parts),
            applied=_moved(self.applied, move),
            new=_moved(self.new, move),
            source=None if self.source is None else _moved(self.source, move),
            maybe_source=None if self.maybe_source is None else _moved(self.maybe_source, move),
            clip=clip,
        )


Event = MicroBatch | Update


@dataclass(slots=True)
class ClipCall:
    """One call of clip_grad_norm: bound, input and output by name, the norm that it returned."""

    bound: float | None
    before: dict[str, Array]
    norm: Array


@dataclass(slots=True)
class Scope:
    """Clips since the last update: in an eager loop, or in one trace of a compiled function.

    `origin`: id of an array that a clip returned -> (that array, what went in, the clip).
    """

    tape: Tape = field(default_factory=Tape)
    events: list[Event] = field(default_factory=list)
    origin: dict[int, tuple[Array, Array, Clip]] = field(default_factory=dict)
    clip_calls: list[ClipCall] = field(default_factory=list)

    def clipped(self, before: Mapping[str, Array], after: Mapping[str, Array], clip: Clip) -> None:
        """Remember which array each clipped one came from."""
        for name, output in after.items():
            if name in before and output is not before[name]:
                self.origin[id(output)] = (output, before[name], clip)

    def forget(self) -> None:
        """An update ends what was remembered for it."""
        self.origin.clear()
        self.clip_calls.clear()

    def gradients(self, event_of: Callable[[Tape], MicroBatch]) -> MicroBatch:
        """Add a micro-batch to the tape."""
        event = event_of(self.tape)
        self.events.append(event)
        return event

    def update(self, parts: Sequence[tuple[Any, tuple[str, ...]]], applied: Mapping[str, Array], new: Tree) -> Update:
        """Add an update to the tape, with the way back from its gradients through the clips."""
        source, clip = self._traced_back(applied)
        maybe = None
        if self.clip_calls:
            call, only = self.clip_calls[-1], len(self.clip_calls) == 1
            # Called once a tensor, it clips each by its own norm.
            each = not only and all(len(one.before) == 1 for one in self.clip_calls)
            clip = Clip("tensor" if each else "norm", call.bound, self.tape.put(call.norm) if only else None)
            if only and source is None and call.before.keys() >= applied.keys():
                maybe = self.tape.put_all({name: call.before[name] for name in applied})
        event = Update(
            tuple(Part(o, names, self.tape.put_all(flatten(o.state))) for o, names in parts),
            self.tape.put_all(applied),
            self.tape.put_all(flatten(new)),
            source,
            maybe,
            clip,
        )
        self.events.append(event)
        self.forget()
        return event

    def _traced_back(self, applied: Mapping[str, Array]) -> tuple[Slots | None, Clip | None]:
        """Each applied array followed back through the clips that made it; None if no clip made any."""
        found: dict[str, Array] = {}
        clip = None
        for name, array in applied.items():
            while (step := self.origin.get(id(array))) is not None:
                array, clip = step[1], step[2]
            found[name] = array
        return (self.tape.put_all(found) if clip is not None else None), clip


def micro_batch_event(
    tape: Tape,
    arguments: Sequence[tuple[str, str, Array]],
    value: Any,
    gradients: Mapping[str, Array],
    captured: Captured,
    training: Mode | None,
) -> MicroBatch:
    """Event of one value_and_grad call.  A tuple's first element is the loss; a scalar integer beside it, the count."""
    import mlx.core as mx

    values = list(value) if isinstance(value, (tuple, list)) else [value]
    loss = values[0] if values and isinstance(values[0], mx.array) else None
    count = next((v for v in values[1:2] if isinstance(v, mx.array) and v.ndim == 0), None)
    return MicroBatch(
        tuple(ArgumentSlot(position, name, tape.put(array)) for position, name, array in arguments),
        None if loss is None else tape.put(loss),
        # Values beside the loss are stop_gradients, and mx.compile (0.32.4) fails on one as an output when what is below it
        # occurs twice in the graph (IndexError: _Map_base::at).  A sum of its own is no such output.
        None if count is None else tape.put(count + 0),
        tape.put_all(gradients),
        modules=_put_outputs(tape, captured.modules),
        tokens=_put_outputs(tape, captured.tokens),
        training=training,
    )


def _put_outputs(tape: Tape, outputs: Sequence[Output]) -> tuple[OutputSlot, ...]:
    return tuple(OutputSlot(output.name, output.original, tape.put(output.array)) for output in outputs)


def loss_arguments(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], parameters: frozenset[int]
) -> list[tuple[str, str, Array]]:
    """(position, parameter name, array) of what a loss function was given, without models and trained parameters.

    A dict is opened, its keys are the names; lists and tuples are opened without names.  `parameters`: positions of the
    trees that are differentiated.
    """
    import mlx.nn as nn

    names = _parameter_names(function, len(args))
    found: list[tuple[str, str, Array]] = []
    kept = [(names[i], value) for i, value in enumerate(args) if i not in parameters]
    position = 0
    for name, value in [*kept, *kwargs.items()]:
        if isinstance(value, nn.Module):
            continue
        found.extend(_leaves(str(position), name, value))
        position += 1
    return found


def _leaves(position: str, name: str, value: Any) -> list[tuple[str, str, Array]]:
    import mlx.core as mx

    if isinstance(value, mx.array):
        return [(position, name, value)]
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        return [(position, name, mx.array(value))]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(f"{position}.{key}", str(key), item)]
    if isinstance(value, (list, tuple)):
        return [leaf for i, item in enumerate(value) for leaf in _leaves(f"{position}.{i}", "", item)]
    return []


def _parameter_names(function: Any, count: int) -> list[str]:
    """Names of the first `count` positional parameters, empty where there is none to be had."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return [""] * count
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [parameter.name for parameter in signature.parameters.values() if parameter.kind in kinds]
    return [*names[:count], *[""] * (count - len(names))]


def _moved(slots: Slots, move: Callable[[int], int]) -> Slots:
    return {name: move(slot) for name, slot in slots.items()}
