"""The course of a PyTorch run, told by its hooks: forward, backward, clip, update; it puts them into steps.

A step is one update of the model.  It begins with the first training forward after an update and ends with the
update; where several optimizers share the work it ends with the last of them that has gradients to apply.  Step 0 is
taken at the first training forward, before any update.

Invariants: no method changes a tensor (a twin's starting point aside), a generator or a graph; models and optimizers are
referred to weakly or for the length of a step; methods may raise (their callers run them under the recorder's guard).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tracer.backends.pytorch_autocast import Autocast
from tracer.backends.pytorch_batch import batch_records, named_arguments, with_targets
from tracer.backends.pytorch_forward import Forwards, MicroBatch, token_losses
from tracer.backends.pytorch_idle import Idle, overflowed
from tracer.backends.pytorch_micro import MicroGradients
from tracer.backends.pytorch_model import initial_records, is_flattened, model_facts, trainable, training_mode
from tracer.backends.pytorch_optimizer import bias_correction, groups_of, merged, state_records
from tracer.backends.pytorch_perturb import perturb
from tracer.backends.pytorch_registry import Call, Named, Registry
from tracer.backends.pytorch_step import Clip, Step
from tracer.backends.pytorch_tensors import Taken, numpy_rng_record, record_of, rng_records, take, unrecorded
from tracer.modes import TrainingMode
from tracer.schema import Phase, Record
from tracer.unheld import observe_unheld

if TYPE_CHECKING:
    from tracer.recorder import Recorder


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A loss that a GradScaler multiplied: the result, the loss before, the factor."""

    result: weakref.ref[Any] | None
    loss: Taken | None
    scale: float


@dataclass(frozen=True, slots=True)
class _Forward:
    """A forward in eval mode, which was training if a backward follows."""

    micro_batch: MicroBatch
    rng: list[Record]


class Run:
    """The run as seen so far."""

    def __init__(self, recorder: Recorder, registry: Registry) -> None:
        self.recorder = recorder
        self.registry = registry
        # What the trainer drew for the micro-batch under way, where a trainer is hooked.
        self.inputs: Mapping[str, Any] = {}
        # Updates seen; one that a GradScaler skips does not count.
        self.updates = 0
        self._step = Step()
        self._candidate: _Forward | None = None
        self._scaled: _Scaled | None = None
        # Factor that a GradScaler multiplied the loss of the backward under way by.
        self._last_scale = 1.0
        self._forwards = Forwards(recorder)
        self._micro_gradients = MicroGradients(recorder)
        self._autocast = Autocast(recorder)
        self._training = TrainingMode(recorder)
        self._idle = Idle()
        # Optimizers that are updating now: the first, and any that it drives.
        self._updating: list[Any] = []
        self._idle_update = False
        self._backwards_in_update = 0
        self._backward_under_way = False
        self._perturbed = recorder.options.twin is None

    def _perturb(self) -> None:
        """Make this run the twin that it is asked to be, once, as soon as its models are known."""
        twin = self.recorder.options.twin
        if self._perturbed or twin is None or not self.registry.live():
            return
        self._perturbed = True
        if twin.seed is not None and not perturb(self.registry, twin, self.recorder.names):
            self.recorder.stop("this is to be a twin, and no parameter was found whose start could be moved")

    def _start(self) -> None:
        """Record step 0, once: the state before the first update."""
        if self.registry.settled:
            return
        import torch

        if any(is_flattened(model.root) for model in self.registry.models):
            self.recorder.stop(
                "FullyShardedDataParallel holds flattened parts, which have no names; fully_shard is recorded"
            )
            return
        self._perturb()
        self.registry.settled = True
        recorder, names = self.recorder, self.recorder.names
        if recorder.wants(Phase.INIT):
            without_model = self.registry.without_model()
            recorder.add(Phase.INIT, initial_records(self.registry.models, names))
            recorder.add(Phase.INIT, [record_of(names, name, take(p)) for name, p in without_model])
            numpy_rng = numpy_rng_record()
            recorder.add(Phase.INIT, rng_records() + ([numpy_rng] if numpy_rng else []))
        if recorder.wants(Phase.OPT_STATE):
            held = [(self.registry.named(optimizer), optimizer.state) for optimizer in self.registry.live()]
            recorder.add(Phase.OPT_STATE, state_records(held, names))
        # Only now: importing torch does not make it the framework that trains.
        recorder.observe("framework", "torch")
        recorder.observe("framework.version", str(torch.__version__))
        for key, value in model_facts(self.registry.models).items():
            recorder.observe(key, value)
        recorder.end_step()

    # Forward and backward.

    def forward(self, module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """A root module is called with gradients enabled."""
        self.registry.called(module)
        call = self.registry.outermost(Call(module, args, kwargs))
        self._perturb()
        if self._step.stepped and not self._backward_under_way:
            self._end_step()
        # torch.compile's wrapper keeps the mode that the module had when it was wrapped.
        training = call.module._modules.get("_orig_mod", call.module).training
        if training:
            self._start()
        rng = [] if self._step.rng or not self.recorder.wants(Phase.HPARAMS) else rng_records()
        if self.recorder.step <= 1:
            self._autocast.begin(call.module)
        micro_batch = self._micro_batch(call.module, call.args, call.kwargs)
        micro_batch.training = training_mode(call.module)
        self._candidate = None if training else _Forward(micro_batch, rng)
        if training:
            self._step.rng = self._step.rng or rng
            self._step.wait(micro_batch)

    def _micro_batch(self, module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> MicroBatch:
        """What a root module is called with; its modules are hooked for this call if their outputs are asked for."""
        inside = self.recorder.wants(Phase.FORWARD)
        tokens = self.recorder.options.token_loss and self.recorder.wants(Phase.LOSS)
        if not (inside or tokens or self.recorder.wants(Phase.BATCH)):
            return MicroBatch([])
        batch = batch_records(named_arguments(module, args, kwargs), self.inputs)
        prefix = next((m.prefix for m in self.registry.models if m.root is module), "")
        return MicroBatch(batch, self._forwards.begin(module, prefix, batch) if inside else None)

    def cross_entropy(
        self, original: Callable[..., Any], logits: Any, target: Any, *, ignored: int, whole: bool
    ) -> None:
        """The program has computed a cross-entropy; it may know labels that the model was not given."""
        if self._candidate is not None:
            micro_batch = self._candidate.micro_batch
        elif self._step.waiting:
            micro_batch = self._step.waiting[-1]
        else:
            return
        micro_batch.batch = with_targets(micro_batch.batch, target, ignored=ignored, whole=whole)
        wanted = self.recorder.options.token_loss and self.recorder.wants(Phase.LOSS)
        if wanted and micro_batch.token_loss is None and len(micro_batch.shape) == 2:
            rows, length = micro_batch.shape
            micro_batch.token_loss = token_losses(original, logits, target, ignored, (rows, length))

    def scaled(self, outputs: Any, result: Any, scale: float) -> None:
        """A GradScaler has multiplied a loss (or several) by `scale`."""
        if hasattr(result, "element_size"):
            self._scaled = _Scaled(weakref.ref(result), take(outputs), scale)
        else:
            self._scaled = _Scaled(None, None, scale)

    def backward_begins(self, tensors: Any, weights: Any) -> None:
        """The program calls backward on `tensors` (one, or several) with `weights` (usually none)."""
        self._idle.backward_seen = True
        self._autocast.end()
        if not self.registry.live():
            return
        if self._step.stepped:
            self._end_step()
        self._start()
        self._autocast.observe()
        if self._step.losses and all(p.grad is None for _, p in self.registry.tracked()):
            # The gradients so far were thrown away.  (Where they are zeroed instead, this cannot be told from a
            # micro-batch without a gradient, and the micro-batches stay.)
            self._step.discard_micro_batches()
        if self._candidate is not None:
            self._step.waiting = [self._candidate.micro_batch]
            self._step.rng = self._step.rng or self._candidate.rng
            self._candidate = None
        self._step.begin_micro_batch(self._loss(tensors, weights))
        if self.recorder.options.micro_grads and self.recorder.wants(Phase.GRAD):
            self._micro_gradients.begin(self.registry.tracked())
        self._backward_under_way = True

    def _loss(self, tensors: Any, weights: Any) -> Record:
        scaled, self._scaled = self._scaled, None
        self._last_scale = scaled.scale if scaled else 1.0
        self._step.scales.add(self._last_scale)
        if isinstance(tensors, tuple | list) and len(tensors) == 1:
            tensors = tensors[0]
        if not hasattr(tensors, "element_size") or tensors.numel() != 1 or weights not in (None, (None,), [None]):
            return unrecorded("loss")
        taken: Taken | None = take(tensors)
        if scaled is not None:
            # What is differentiated is a multiple of the loss, known only if nothing was done to it on its way.
            taken = scaled.loss if scaled.result is not None and scaled.result() is tensors else None
        if taken is None or taken.data is None:
            return unrecorded("loss")
        return Record("loss", taken.data.reshape(()), taken.dtype, ())

    def backward_ended(self, *, failed: bool) -> None:
        """The outermost backward has returned, or raised."""
        under_way, self._backward_under_way = self._backward_under_way, False
        if not under_way:
            return
        if failed:
            self._micro_gradients.discard()
            self._step.undo_micro_batch()
            return
        if self.recorder.options.micro_grads and self.recorder.wants(Phase.GRAD):
            scale = self._last_scale
            self._step.micro_grads.append(self._micro_gradients.end(self.registry.tracked(), scale))
        if self._updating:
            self._backwards_in_update += 1
        if self._step.stepped:
            # The optimizer works inside the backward, one parameter at a time.
            self._end_step()
        elif self.recorder.wants(Phase.GRAD) or self.recorder.wants(Phase.CLIPPED_GRAD):
            self._step.tracked = self.registry.tracked()
            self._step.snapshot()

    def before_clip(self) -> None:
        """The program is about to clip: its gradients are what it has accumulated."""
        self._step.average()

    def clipped(self, mode: str, limit: float, norm: Any, *, alone: bool) -> None:
        """The program has clipped by norm (which returned the norm) or by value.  `alone`: a single tensor."""
        taken = take(norm) if hasattr(norm, "element_size") else None
        self._step.clips.append(Clip(mode, limit, taken, alone=alone and mode == "norm"))

    # The update.

    def update_begins(self, optimizer: Any, *, closure: bool) -> None:
        """An optimizer is about to update its parameters."""
        if any(o is optimizer for o in self._updating):
            # Its last update raised, so that its end was never seen.
            self._updating = []
        self._updating.append(optimizer)
        if len(self._updating) > 1:
            return
        self._backwards_in_update = 0
        self._idle_update = not closure and self._is_idle(optimizer)
        if self._idle_update:
            if not self.updates:
                self._idle.update(self.registry, optimizer)
            return
        self._start()
        if id(optimizer) in self._step.stepped:
            self._end_step()
        if not closure:
            # With a closure the gradients are still to come; see `_settle_closure`.
            self._take_given(optimizer)
        self._take_groups(optimizer)

    def _take_given(self, optimizer: Any) -> None:
        if self.recorder.wants(Phase.CLIPPED_GRAD):
            # A fused optimizer divides by the GradScaler's scale itself.
            scale = getattr(optimizer, "grad_scale", None)
            self._step.given_to(trainable(optimizer), 1.0 if scale is None else float(scale))

    def _take_groups(self, optimizer: Any) -> None:
        if not self.recorder.wants(Phase.HPARAMS):
            return
        names = {id(p): self.recorder.names(name).name for name, p in self.registry.tracked()}
        self._step.groups += groups_of(optimizer, lambda p: names.get(id(p), ""))
        # Where no forward was seen, this is the earliest that is known of the generators.
        self._step.rng = self._step.rng or rng_records()

    def update_ended(self, optimizer: Any, *, closure: bool) -> None:
        """An optimizer has updated its parameters."""
        if not self._updating or self._updating[0] is not optimizer:
            # Another optimizer drives this one; the outer one's update is the step.
            return
        inner = [o for o in self._updating if o is not optimizer]
        self._updating = []
        if self._idle_update:
            return
        self.updates += 1
        if closure:
            self._settle_closure(optimizer)
        recorder = self.recorder
        states = [optimizer.state, *(o.state for o in inner)] if recorder.wants(Phase.OPT_STATE) else []
        self._step.updated_by(
            self.registry.named(optimizer), states, recorder.names, with_params=recorder.wants(Phase.PARAM)
        )
        self._step.stepped[id(optimizer)] = optimizer
        recorder.observe("optimizer.class", type(optimizer).__name__)
        if (corrected := bias_correction(optimizer)) is not None:
            recorder.observe("optimizer.bias_correction", corrected)
        if not self._backward_under_way and not self._more_to_come():
            self._end_step()

    def _settle_closure(self, optimizer: Any) -> None:
        """The update computed its own gradients: if it did so only once they are still there, else they are lost."""
        if self._backwards_in_update <= 1:
            self._take_given(optimizer)
        else:
            self._step.grads = None

    def _more_to_come(self) -> bool:
        """Whether another optimizer has gradients to apply in this step."""
        waiting = {id(p) for _, p in self.registry.tracked() if p.grad is not None} - set(self._step.updated)
        return any(
            any(id(p) in waiting for p in trainable(optimizer))
            for optimizer in self.registry.live()
            if id(optimizer) not in self._step.stepped
        )

    def update_skipped(self) -> None:
        """A GradScaler found inf or nan and skipped the update; the gradients will be thrown away."""
        self._idle.skipped()
        if not self._step.stepped:
            self._step.discard_micro_batches()

    def _is_idle(self, optimizer: Any) -> bool:
        """Whether an update is no step of the run: it has no gradient, and nothing was differentiated that it could follow.

        A backward that reaches none of what the optimizer holds is a fault of the program, and its step is one.
        """
        if overflowed(optimizer):
            return True
        if any(p.grad is not None for p in trainable(optimizer)):
            return False
        return not self._step.losses or self._more_to_come()

    # The end of a step.

    def finish(self) -> None:
        """End a step that still waited for another optimizer when the run ended."""
        self._forwards.close()
        self._micro_gradients.discard()
        self._autocast.end()
        if self._step.stepped:
            self._end_step()
        if not self.updates and (explained := self._idle.explanation()) is not None:
            self.recorder.explain(*explained)

    def _end_step(self) -> None:
        step, recorder = self._step, self.recorder
        step.tracked, unheld = self.registry.tracked(), self.registry.unheld()
        self._observe_step(unheld)
        recorder.add(Phase.HPARAMS, step.hparams())
        recorder.add(Phase.HPARAMS, self._training.of_step(forward.training for forward in step.forwards()))
        for i, batch in enumerate(step.batch_records()):
            recorder.add(Phase.BATCH, batch, i)
        for i, forward in enumerate(step.forwards()):
            recorder.add(Phase.FORWARD, forward.forward_records(recorder.wants_module), i)
        for i, losses in enumerate(step.loss_records(tokens=recorder.options.token_loss)):
            recorder.add(Phase.LOSS, losses, i)
        gradients: list[Record] = []
        if recorder.wants(Phase.GRAD):
            for i, of_micro_batch in enumerate(step.micro_gradient_records(recorder.names)):
                recorder.add(Phase.GRAD, of_micro_batch, i)
            gradients = step.gradient_records(recorder.names)
            recorder.add(Phase.GRAD, gradients)
        if recorder.wants(Phase.CLIPPED_GRAD):
            recorder.add(Phase.CLIPPED_GRAD, step.given_records(recorder.names, gradients))
        recorder.add(Phase.OPT_STATE, step.state_records(recorder.names))
        if recorder.wants(Phase.PARAM):
            step.take_params(unheld, recorder.names)
        recorder.add(Phase.PARAM, step.param_records())
        # A forward that no backward followed is no part of the next step.
        self._step = Step()
        self.registry.step_ended()
        recorder.end_step()

    def _observe_step(self, unheld: Sequence[Named]) -> None:
        """Settings that show once there has been a step.  `unheld`: the trainable parameters that no optimizer holds."""
        step, recorder = self._step, self.recorder
        if recorder.step != 1:
            return
        if step.losses:
            recorder.observe("accumulation", len(step.losses))
        self._autocast.observe()
        observe_unheld(recorder, [name for name, _ in unheld])
        groups = merged(step.groups)
        if len(groups) > 1:
            recorder.observe("optimizer.groups", {f"group{i}": list(g.names) for i, g in enumerate(groups)})
        if (clip := step.clipped()) is not None:
            recorder.observe("clip.mode", clip[0])
            recorder.observe("clip.value", clip[1])
        elif recorder.wants(Phase.CLIPPED_GRAD) and step.updated and step.unclipped():
            recorder.observe("clip.mode", "none")
