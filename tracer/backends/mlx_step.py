"""From events to rows: one optimizer update and the micro-batches before it become one recorded step.

What the gradient was before clipping is answered in this order: the way back through the clips that were seen; the
input of the only clip_grad_norm; the raw gradient of the only micro-batch; with several micro-batches and no clip, what
was applied.  Without an answer it is `unrecorded`.  Everything here runs on the training thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy.typing as npt

from tracer.backends.mlx_arrays import (
    Array,
    array_record,
    dtype_name,
    evaluate,
    plain_record,
    same_bits,
    to_numpy,
    unrecorded,
)
from tracer.backends.mlx_batch import Argument, Count, Named, map_batch
from tracer.backends.mlx_events import MicroBatch, OutputSlot, Part, Slots, Update
from tracer.backends.mlx_forward import Output
from tracer.backends.mlx_model import Snapshot, add_init, is_number, rng_records, shared_state, state_records
from tracer.backends.mlx_outputs import Sampled, forward_records, sample, token_loss_record, token_losses
from tracer.dtypes import is_float
from tracer.modes import Mode, TrainingMode
from tracer.recorder import Recorder
from tracer.schema import REPORTED_PREFIX, Phase, Record, State
from tracer.unheld import observe_unheld

# A run that never updates through an optimizer must not fill the memory.
MAX_MICRO_BATCHES: Final = 4096

NOT_MOVED: Final = "this is to be a twin, and no model was found whose start could be moved"

NOT_SEEN: Final = (
    "an optimizer update was compiled without `inputs=` and `outputs=`, or before recording began; "
    "its values cannot be seen"
)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Records of a batch, and those of arguments that have no value."""

    named: list[Named]
    missing: list[Record]


@dataclass(slots=True)
class _Seen:
    """A micro-batch with its arrays.  `raw` is dropped when a second one follows, unless it is recorded by itself.

    `batch`: once it has been asked for.  `sampled`, `tokens`: what was seen inside the forward pass.
    """

    arguments: list[tuple[str, str, Array]]
    loss: Array | None
    count: Array | None
    raw: dict[str, Array]
    training: Mode | None = None
    batch: _Batch | None = None
    sampled: Sampled | None = None
    tokens: Array | None = None


@dataclass(frozen=True, slots=True)
class _Gradients:
    """Arrays of an update: applied, and where they came from (None: not known)."""

    applied: dict[str, Array]
    source: dict[str, Array] | None


class Collector:
    """Holds the micro-batches since the last update, and hands whole steps to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.start: Snapshot | None = None
        self.rng: npt.NDArray[Any] | None = None
        self._pending: list[_Seen] = []
        self._begun = False
        self._trainable: frozenset[str] = frozenset()
        self._training = TrainingMode(recorder)
        twin = recorder.options.twin
        # Whether a twin's starting point has been moved; true where there is nothing to move.
        self.perturbed = twin is None or twin.seed is None

    @property
    def pending(self) -> int:
        """Micro-batches since the last update."""
        return len(self._pending)

    @property
    def needs_start(self) -> bool:
        """Whether the state before training has still to be taken."""
        return self.start is None and not self._begun

    def micro_batch(self, event: MicroBatch, values: Sequence[Array]) -> None:
        """A micro-batch whose arrays are live (eager), or have left a compiled function."""
        arguments = [(a.position, a.name, values[a.slot]) for a in event.arguments]
        loss = None if event.loss is None else values[event.loss]
        count = None if event.count is None else values[event.count]
        each = self.recorder.options.micro_grads
        raw = {} if self._pending and not each else _arrays(event.raw, values)
        for earlier in self._pending:
            earlier.raw = earlier.raw if each else {}
        self._pending.append(seen := _Seen(arguments, loss, count, raw, event.training))
        self._look_inside(seen, event, values)
        if len(self._pending) > MAX_MICRO_BATCHES:
            self.recorder.stop(f"{MAX_MICRO_BATCHES} gradients were taken without an update by an MLX optimizer")

    def _look_inside(self, seen: _Seen, event: MicroBatch, values: Sequence[Array]) -> None:
        """Take the sampled rows of module outputs now, so that whole outputs need not be kept until the update."""
        # Step 0 ends with the first update: until then it is not known to which step this belongs.
        wanted = self.recorder.wants(Phase.LOSS) or self.recorder.wants(Phase.FORWARD) or not self._begun
        if not wanted or not (event.modules or event.tokens):
            return
        batch = _batch(seen).named
        seen.sampled = sample(self.recorder, batch, _outputs(event.modules, values))
        seen.tokens = token_losses(batch, _outputs(event.tokens, values))

    def update(self, event: Update, values: Sequence[Array], *, compiled: bool) -> None:
        """An update ends the step: everything is evaluated at once, copied, and handed over."""
        pending, self._pending = self._pending, []
        applied = _arrays(event.applied, values)
        live = [array for seen in pending for array in _all_arrays(seen)]
        if not evaluate([*live, *values]) and not evaluate(list(applied.values())[:1]):
            self.recorder.stop(NOT_SEEN)
            return
        self._begin()
        gradients = _Gradients(applied, _source(event, values, pending))
        self._observe(event, len(pending), compiled)
        if event.clip is None and gradients.source is not None:
            self.recorder.observe("clip.mode", "none")
        self._add_micro_batches(pending)
        self._add_gradients(gradients, event, values)
        self._add_optimizer(event, values)
        self.recorder.add(Phase.HPARAMS, self._training.of_step(seen.training for seen in pending))
        self.rng = None
        self.recorder.end_step()

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        if not self.perturbed:
            self.recorder.stop(NOT_MOVED)
        if self.start is not None:
            add_init(self.recorder, self.start)
            self._trainable = self.start.trainable
        self.start = None
        self.recorder.end_step()

    def _observe(self, event: Update, micro_batches: int, compiled: bool) -> None:
        observe = self.recorder.observe
        observe("compiled", compiled)
        observe("accumulation", micro_batches)
        if self._trainable:
            observe_unheld(self.recorder, sorted(self._trainable - event.applied.keys()))
        kinds = [type(part.optimizer).__name__ for part in event.parts]
        observe("optimizer.class", kinds[0] if len(kinds) == 1 else kinds)
        corrected = sorted({bool(p.optimizer.bias_correction) for p in event.parts if _corrects(p.optimizer)})
        if len(corrected) == 1:
            observe("optimizer.bias_correction", corrected[0])
        if event.clip is not None:
            observe("clip.mode", event.clip.mode)
        if event.clip is not None and event.clip.value is not None:
            observe("clip.value", event.clip.value)

    def _add_micro_batches(self, pending: Sequence[_Seen]) -> None:
        for i, seen in enumerate(pending):
            if self.recorder.wants(Phase.BATCH):
                self.recorder.add(Phase.BATCH, _batch_records(seen), i)
            if self.recorder.wants(Phase.FORWARD) and seen.sampled is not None:
                self.recorder.add(Phase.FORWARD, forward_records(self.recorder, seen.sampled), i)
            if self.recorder.wants(Phase.LOSS):
                self.recorder.add(Phase.LOSS, self._losses(seen), i)
            if self.recorder.wants(Phase.GRAD) and self.recorder.options.micro_grads:
                own = [array_record(self.recorder.names, name, array) for name, array in seen.raw.items()]
                self.recorder.add(Phase.GRAD, own, i)
        if not pending:
            self.recorder.add(Phase.LOSS, [unrecorded("loss")], 0)

    def _losses(self, seen: _Seen) -> list[Record]:
        loss = unrecorded("loss") if seen.loss is None else array_record(self.recorder.names, "loss", seen.loss)
        each = [token_loss_record(self.recorder, seen.tokens)] if self.recorder.options.token_loss else []
        return [loss, *each]

    def _add_gradients(self, gradients: _Gradients, event: Update, values: Sequence[Array]) -> None:
        recorder = self.recorder
        if not (recorder.wants(Phase.GRAD) or recorder.wants(Phase.CLIPPED_GRAD)):
            return
        applied = [array_record(recorder.names, name, array) for name, array in gradients.applied.items()]
        before = self._before(gradients, applied)
        reported = []
        if event.clip and event.clip.norm is not None:
            reported.append(array_record(recorder.names, f"{REPORTED_PREFIX}grad_norm", values[event.clip.norm]))
        recorder.add(Phase.GRAD, [*before, *reported])
        if recorder.wants(Phase.GRAD) and all(same_bits(a, b) for a, b in zip(before, applied, strict=True)):
            label = Phase.GRAD.label
            applied = [replace(record, alias_of=f"{label}/{record.name}", stored=False) for record in applied]
        recorder.add(Phase.CLIPPED_GRAD, applied)

    def _before(self, gradients: _Gradients, applied: Sequence[Record]) -> list[Record]:
        records = []
        for (name, array), record in zip(gradients.applied.items(), applied, strict=True):
            source = None if gradients.source is None else gradients.source.get(name)
            if source is array:
                records.append(record)
            elif source is None:
                records.append(replace(record, data=None, state=State.UNRECORDED))
            else:
                records.append(array_record(self.recorder.names, name, source))
        return records

    def _add_optimizer(self, event: Update, values: Sequence[Array]) -> None:
        recorder = self.recorder
        states = [_arrays(part.state, values) for part in event.parts]
        shared = [shared_state(part.names, state) for part, state in zip(event.parts, states, strict=True)]
        if recorder.wants(Phase.HPARAMS):
            recorder.add(Phase.HPARAMS, [*self._groups(event.parts, shared), *rng_records(self.rng)])
        if recorder.wants(Phase.OPT_STATE):
            for part, state in zip(event.parts, states, strict=True):
                recorder.add(Phase.OPT_STATE, state_records(recorder.names, part.optimizer, part.names, state))
            recorder.add(Phase.OPT_STATE, self._steps(event.parts, shared))
        if recorder.wants(Phase.PARAM):
            new = _arrays(event.new, values)
            recorder.add(Phase.PARAM, [array_record(recorder.names, name, array) for name, array in new.items()])

    def _groups(self, parts: Sequence[Part], shared: Sequence[Mapping[str, float]]) -> list[Record]:
        """Settings per group; groups of equal settings are one."""
        groups: list[tuple[dict[str, float | bool], list[str]]] = []
        for part, scalars in zip(parts, shared, strict=True):
            settings = group_settings(part.optimizer, scalars)
            same = next((names for known, names in groups if known == settings), None)
            if same is None:
                groups.append((settings, same := []))
            same.extend(self.recorder.names(name).name for name in part.names)
        if len(groups) > 1:
            self.recorder.observe("optimizer.groups", {f"group{i}": names for i, (_, names) in enumerate(groups)})
        return [
            plain_record(f"group{i}.{key}", value, "bool" if isinstance(value, bool) else "float64")
            for i, (settings, _) in enumerate(groups)
            for key, value in settings.items()
        ]

    def _steps(self, parts: Sequence[Part], shared: Sequence[Mapping[str, float]]) -> list[Record]:
        counts = [scalars.get("step") for scalars in shared]
        if any(count is None for count in counts):
            return [unrecorded("step", "int64")]
        if len(set(counts)) == 1:
            return [plain_record("step", int(counts[0] or 0), "int64", original="step")]
        return [
            plain_record(f"{self.recorder.names(name).name}/step", int(count or 0), "int64", original="step")
            for part, count in zip(parts, counts, strict=True)
            for name in part.names
        ]


def group_settings(optimizer: Any, shared: Mapping[str, float]) -> dict[str, float | bool]:
    """Settings of an optimizer as it holds them after the update: `lr`, `beta1`, `eps`, `bias_correction` ..."""
    import mlx.optimizers as optim

    settings: dict[str, float | bool] = {}
    if "learning_rate" in shared:
        settings["lr"] = shared["learning_rate"]
    for key, value in vars(optimizer).items():
        if key.startswith("_"):
            continue
        key = "beta1" if key == "beta_1" else key
        if isinstance(value, bool):
            settings[key] = value
        elif isinstance(value, (int, float)):
            settings[key] = float(value)
        elif isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value):
            stem = "beta" if key == "betas" else key
            settings.update({f"{stem}{i}": float(item) for i, item in enumerate(value, 1)})
    if isinstance(optimizer, (optim.Adam, optim.RMSprop, optim.Adagrad, optim.AdaDelta)):
        # These have no decay at all; PyTorch's have one of 0.
        settings.setdefault("weight_decay", 0.0)
    others = {key: value for key, value in shared.items() if key not in ("step", "learning_rate")}
    return {**settings, **others}


def _source(event: Update, values: Sequence[Array], pending: Sequence[_Seen]) -> dict[str, Array] | None:
    """Gradients before clipping, by name; see the module's docstring."""
    if event.source is not None:
        return _arrays(event.source, values)
    if event.maybe_source is not None:
        return _arrays(event.maybe_source, values)
    losses = [seen.loss for seen in pending if seen.loss is not None]
    if not pending or len(losses) < len(pending) or not evaluate(losses):
        # A micro-batch is missing, or was seen only while a function was being traced.
        return None
    return (pending[0].raw or None) if len(pending) == 1 else _arrays(event.applied, values)


def _batch(seen: _Seen) -> _Batch:
    """The batch of a micro-batch, read once."""
    if seen.batch is None:
        arguments, missing = [], []
        for position, name, array in seen.arguments:
            value = to_numpy(array)
            if value is None:
                missing.append(unrecorded(f"args.{position}", dtype_name(array), tuple(array.shape)))
            else:
                arguments.append(Argument(position, name, value, dtype_name(array)))
        seen.batch = _Batch(map_batch(arguments, returned=_count(seen.count)), missing)
    return seen.batch


def _batch_records(seen: _Seen) -> list[Record]:
    batch = _batch(seen)
    return [*(plain_record(n.name, n.value, n.dtype) for n in batch.named), *batch.missing]


def _outputs(slots: Sequence[OutputSlot], values: Sequence[Array]) -> list[Output]:
    return [Output(slot.name, slot.original, values[slot.slot]) for slot in slots]


def _count(array: Array | None) -> Count | None:
    """A token count that a loss function returned beside the loss, if it is a whole number."""
    if array is None or not is_number(dtype_name(array)) or not evaluate([array]):
        return None
    value = float(array.item())
    return Count(int(value), certain=not is_float(dtype_name(array))) if value.is_integer() and value > 0 else None


def _corrects(optimizer: Any) -> bool:
    return isinstance(getattr(optimizer, "bias_correction", None), bool)


def _arrays(slots: Slots, values: Sequence[Array]) -> dict[str, Array]:
    return {name: values[slot] for name, slot in slots.items()}


def _all_arrays(seen: _Seen) -> list[Array]:
    scalars = [array for array in (seen.loss, seen.count) if array is not None]
    inside = [] if seen.sampled is None else seen.sampled.arrays
    tokens = [] if seen.tokens is None else [seen.tokens]
    return [*scalars, *seen.raw.values(), *(array for _, _, array in seen.arguments), *inside, *tokens]
