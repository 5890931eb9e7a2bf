"""One step of a PyTorch run: what the hooks have seen of it so far, and the records that it becomes.

Knows nothing of hooks.  Invariant: a gradient that was not seen at the right moment is *unrecorded*; it is never
replaced by one that was seen at another.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tracer.backends.pytorch_copies import copy_together, groups_of_plain, take_all
from tracer.backends.pytorch_forward import MicroBatch
from tracer.backends.pytorch_optimizer import Group, group_records, merged, step_records, take_state
from tracer.backends.pytorch_registry import Named
from tracer.backends.pytorch_tensors import (
    Taken,
    alias_of,
    is_share,
    no_gradient,
    record_of,
    same_bits,
    take,
    unrecorded,
    unrecorded_like,
    unscaled,
)
from tracer.names import NameMap
from tracer.schema import REPORTED_PREFIX, TOKEN_LOSS, Phase, Record

# Bytes of batches and module outputs that are held while no backward has come for them, beside the latest.
WAITING_BYTES: Final = 256 * 2**20
# A forward that was seen, and of which nothing is held any more.
LET_GO: Final = MicroBatch([unrecorded("input_ids", "int64")])


@dataclass(frozen=True, slots=True)
class Clip:
    """A call of a clip function: how, at which bound, the norm that it returned; `alone`: it was given one tensor."""

    mode: str
    bound: float
    norm: Taken | None
    alone: bool


@dataclass(slots=True)
class Step:
    """The step under way.  Everything in here is a copy, except `tracked`: the trainable parameters by name."""

    tracked: list[Named] = field(default_factory=list)
    rng: list[Record] = field(default_factory=list)
    # Batches whose backward has not begun (and bytes of each that is still held), and those whose backward has.
    waiting: list[MicroBatch] = field(default_factory=list)
    held: deque[int] = field(default_factory=deque)
    held_bytes: int = 0
    batches: list[MicroBatch] = field(default_factory=list)
    losses: list[Record] = field(default_factory=list)
    # Gradient of each backward by id of the parameter, where they are asked for.
    micro_grads: list[dict[int, Taken]] = field(default_factory=list)
    # Batches before the latest backward.
    before: int = 0
    # Gradients after the latest backward, by id of the parameter; None before the first.
    grads: dict[int, Taken] | None = None
    # Factors that a GradScaler multiplied the losses of this step by.
    scales: set[float] = field(default_factory=set)
    clips: list[Clip] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    # What the optimizer got, by id; the snapshot itself where the bits are equal.
    given: dict[int, Taken] = field(default_factory=dict)
    updated: dict[int, Named] = field(default_factory=dict)
    state: dict[int, list[Record]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    params: dict[int, Record] = field(default_factory=dict)
    # Optimizers that have made their update, by id; kept until the step ends so that no id is used twice.
    stepped: dict[int, Any] = field(default_factory=dict)

    def wait(self, micro_batch: MicroBatch) -> None:
        """A training forward begins; the backward may come after others, or never.

        Of many without a backward the latest are kept, the others become unrecorded: a program that evaluates as it trains,
        with gradients enabled, must not fill the memory.
        """
        if self.waiting:
            self.held.append(_bytes_of(self.waiting[-1]))
            self.held_bytes += self.held[-1]
        self.waiting.append(micro_batch)
        while self.held_bytes > WAITING_BYTES:
            self.waiting[len(self.waiting) - 1 - len(self.held)] = LET_GO
            self.held_bytes -= self.held.popleft()

    def begin_micro_batch(self, loss: Record) -> None:
        """A backward begins: the forwards since the last one belong to it."""
        self.before = len(self.batches)
        self.batches += self.waiting
        self.waiting = []
        self.held, self.held_bytes = deque(), 0
        self.losses.append(loss)

    def undo_micro_batch(self) -> None:
        """The backward raised, and the program goes on without it."""
        del self.batches[self.before :]
        self.losses.pop()
        del self.micro_grads[len(self.losses) :]

    def discard_micro_batches(self) -> None:
        """Forget the micro-batches so far: their gradients were thrown away without an update."""
        self.batches, self.losses, self.micro_grads, self.grads = [], [], [], None
        self.scales, self.clips = set(), []

    def snapshot(self) -> None:
        """Copy the gradients as they are after a backward, unscaled."""
        if len(self.scales) > 1:
            # Gradients of differently scaled losses were added up: no factor undoes that.
            self.grads = {id(p): unrecorded_like(p) for _, p in self.tracked}
            return
        scale = next(iter(self.scales), 1.0)
        grads = [(p, p.grad) for _, p in self.tracked]
        taken = iter(take_all([grad for _, grad in grads if grad is not None]))
        self.grads = {id(p): no_gradient(p) if grad is None else unscaled(next(taken), scale) for p, grad in grads}

    def average(self) -> None:
        """Take note of a program that has divided its gradients by the number of micro-batches.

        That belongs to accumulating them, as where each loss is divided before its backward: the snapshot becomes what the
        parameters hold now.  Anything else that a program does to gradients leaves the snapshot as it is, and so does whatever
        follows a clip.
        """
        count = len(self.losses)
        if count < 2 or self.grads is None or self.clipped() is not None:
            return
        # One after the other: nearly always the first one that is looked at says no.
        now = (
            (self.grads[id(p)], no_gradient(p) if p.grad is None else take(p.grad, live=True))
            for _, p in self.tracked
            if id(p) in self.grads
        )
        if all(is_share(before, taken, count) for before, taken in now):
            scale = next(iter(self.scales), 1.0)
            if scale == 1.0:
                self.snapshot()

    def given_to(self, parameters: Sequence[Any], scale: float) -> None:
        """Take the gradients that the optimizer is about to use; a copy is made only where they changed since the
        backward.  `scale`: what the optimizer itself divides them by."""
        self.average()
        grads = {id(p): p.grad for p in parameters if p.grad is not None}
        keys, tensors = list(grads), list(grads.values())
        groups, alone = groups_of_plain(tensors) if scale == 1.0 else ([], list(range(len(keys))))
        for group in groups:
            self._given_together([keys[i] for i in group], [tensors[i] for i in group])
        for i in alone:
            self.given[keys[i]] = self._given_alone(keys[i], tensors[i], scale)
        for parameter in parameters:
            if id(parameter) not in grads:
                self.given[id(parameter)] = self._known(id(parameter), no_gradient(parameter))

    def _given_together(self, keys: Sequence[int], grads: Sequence[Any]) -> None:
        now = copy_together(grads)
        before = [(self.grads or {}).get(key) for key in keys]
        kept = before if now.same_bits(before) else now.each()
        self.given.update((key, taken) for key, taken in zip(keys, kept, strict=True) if taken is not None)

    def _given_alone(self, key: int, grad: Any, scale: float) -> Taken:
        now = self._known(key, looked := unscaled(take(grad, live=True), scale))
        return take(grad) if now is looked and scale == 1.0 else now

    def _known(self, key: int, now: Taken) -> Taken:
        """The snapshot of a gradient if that has the same bits as it has now."""
        before = (self.grads or {}).get(key)
        return before if before is not None and same_bits(before, now) else now

    def updated_by(
        self, parameters: Sequence[Named], states: Sequence[Mapping[Any, Any]], names: NameMap, *, with_params: bool
    ) -> None:
        """Take what an update has made: the parameters, and the optimizer's state of them (of no `states`: none)."""
        keys = [id(parameter) for _, parameter in parameters]
        self.updated.update(zip(keys, parameters, strict=True))
        records, counts = take_state(parameters, states, names)
        self.state.update(zip(keys, records, strict=True))
        self.counts |= counts
        if with_params:
            self.take_params(parameters, names)

    def take_params(self, parameters: Sequence[Named], names: NameMap) -> None:
        """Take parameters as they are after the update: of the optimizer's, or such as none holds."""
        taken = take_all([parameter for _, parameter in parameters])
        for (name, parameter), value in zip(parameters, taken, strict=True):
            self.params[id(parameter)] = record_of(names, name, value)

    # The records of the finished step.

    def hparams(self) -> list[Record]:
        """Settings of the groups, and the generators' states at the start of the step."""
        return group_records(merged(self.groups)) + self.rng

    def gradient_records(self, names: NameMap) -> list[Record]:
        """Phase `grad`: accumulated, before clipping; and the norms that the run's clip function returned."""
        grads = self.grads or {}
        records = [record_of(names, name, grads.get(id(p)) or unrecorded_like(p)) for name, p in self.tracked]
        # Norms of single tensors have no counterpart in a run that clips by the norm of all of them.
        by_tensor = self._clips_by_tensor()
        norms = [clip.norm for clip in self.clips if clip.norm is not None and not (by_tensor and clip.alone)]
        return records + [
            Record(
                f"{REPORTED_PREFIX}grad_norm{'' if len(norms) == 1 else f'.{i}'}",
                norm.data, norm.dtype, norm.shape, state=norm.state,
            )
            for i, norm in enumerate(norms)
        ]  # fmt: skip

    def _clips_by_tensor(self) -> bool:
        """Whether the program clips each of several tensors by its own norm."""
        return sum(clip.alone for clip in self.clips) > 1

    def clipped(self) -> tuple[str, float] | None:
        """How the program clips, and at which bound: as its first clip with a bound does; None without one."""
        first = next((clip for clip in self.clips if math.isfinite(clip.bound)), None)
        if first is None:
            return None
        return "tensor" if first.alone and self._clips_by_tensor() else first.mode, first.bound

    def unclipped(self) -> bool:
        """Whether the optimizer got exactly the gradients that the last backward left."""
        grads = self.grads or {}
        return all(key in grads and self.given.get(key) is grads[key] for key in self.updated)

    def given_records(self, names: NameMap, gradients: Sequence[Record]) -> list[Record]:
        """Phase `clipped_grad`; references to `gradients`, what `gradient_records` gave (nothing if `grad` is not recorded),
        where nothing was changed."""
        if gradients and self.unclipped():
            label = Phase.GRAD.label
            of_tracked = zip(self.tracked, gradients, strict=False)  # norms come after them
            return [alias_of(r, f"{label}/{r.name}") for (_, p), r in of_tracked if id(p) in self.updated]
        return [record_of(names, name, self.given.get(id(p)) or unrecorded_like(p)) for name, p in self._in_order()]

    def state_records(self, names: NameMap) -> list[Record]:
        """Phase `opt_state`."""
        records = [record for _, p in self._in_order() for record in self.state[id(p)]]
        return records + step_records(self.counts, names)

    def param_records(self) -> list[Record]:
        """Phase `param`: what was updated, and what no optimizer holds, in the model's order whatever that of the updates."""
        return [self.params[id(p)] for _, p in self.tracked if id(p) in self.params]

    def _in_order(self) -> list[Named]:
        return [(name, p) for name, p in self.tracked if id(p) in self.updated]

    def micro_gradient_records(self, names: NameMap) -> list[list[Record]]:
        """Phase `grad`, one row a micro-batch: what its own backward has added."""
        return [
            [record_of(names, name, grads.get(id(p)) or unrecorded_like(p)) for name, p in self.tracked]
            for grads in self.micro_grads
        ]

    def forwards(self) -> list[MicroBatch]:
        """The training forwards; where the program computed gradients without a backward they count all the same."""
        return self.batches if self.losses else self.waiting

    def batch_records(self) -> list[list[Record]]:
        """One batch per forward; unrecorded where there was a backward and no forward was seen."""
        found = [forward.batch for forward in self.forwards()]
        return found or [[unrecorded("input_ids", "int64")] for _ in range(max(1, len(self.losses)))]

    def loss_records(self, *, tokens: bool) -> list[list[Record]]:
        """One row per micro-batch; a step whose backward was not seen has a loss that is unrecorded.

        `tokens`: with the loss of each token, where every backward has one forward.
        """
        rows = [[loss] for loss in self.losses or [unrecorded("loss")]]
        forwards = self.forwards()
        if tokens and len(forwards) == len(rows):
            return [[forward.token_loss_record(), *row] for forward, row in zip(forwards, rows, strict=True)]
        return [[unrecorded(TOKEN_LOSS), *row] for row in rows] if tokens else rows


def _bytes_of(forward: MicroBatch) -> int:
    """Bytes of memory that a forward holds."""
    samples = forward.forward.samples if forward.forward is not None else []
    arrays = [*(r.data for r in forward.batch), *(sample.rows.data for sample in samples), forward.token_loss]
    return sum(array.nbytes for array in arrays if array is not None)
