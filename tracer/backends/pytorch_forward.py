"""Outputs of a model's modules during one training forward, and the loss of each token.

Hooks are put on the modules when the root module is called and taken off when it returns, so that what a backward computes again
(gradient checkpointing), an evaluation or a copy of the model never sees them.  Of an output only the sampled rows are
copied: they are picked first and copied then, never the whole.  Invariants: hooks return nothing and change nothing, no random
number is drawn, no graph is kept, and no hook is put inside compiled code, which would be compiled with it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from tracer.backends.pytorch_model import LORA_FACTORS
from tracer.backends.pytorch_tensors import Taken, is_distributed, take, unrecorded_like
from tracer.dtypes import BFLOAT16, float32_to_bf16, to_numpy
from tracer.modes import Mode
from tracer.names import BASE_LAYER, LORA_DELTA, LORA_DROPOUT
from tracer.positions import relevant_positions
from tracer.schema import POSITIONS, TOKEN_LOSS, Record, State

if TYPE_CHECKING:
    from tracer.recorder import Recorder

Positions = npt.NDArray[np.int64]

# Where the labels are not known before the program computes its loss, this many times the positions are kept until they are.
UNTIL_LABELS: Final = 4
# Tokens whose losses are computed at a time: the float32 copy of their logits is the memory that it takes.
TOKENS: Final = 1024
HEAD: Final = "lm_head"
COMPILED: Final = "the model is compiled: of its modules only the logits can be seen"
COMPILED_PARTS: Final = "parts of the model are compiled: the modules inside them cannot be seen"
# Names under which a language model returns its logits.
LOGITS: Final = "logits"


@dataclass(frozen=True, slots=True)
class _Sample:
    """Sampled rows of one output: its canonical name, the framework's, and the rows [n, features]."""

    name: str
    original: str
    rows: Taken


@dataclass(slots=True)
class Forward:
    """One training forward under way, or done: the outputs sampled so far, in the order in which modules returned."""

    shape: tuple[int, int]
    positions: Positions
    # None: the labels are not known yet, and `positions` are more than will be kept.
    limit: int | None
    mask: npt.NDArray[Any] | None
    samples: list[_Sample] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    handles: list[Any] = field(default_factory=list)

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def rows(self, output: Any) -> Taken | None:
        """The sampled rows of an output, copied; None if it is not [B, L, features]."""
        tensor = _first(output, self.shape)
        return None if tensor is None else _rows(tensor, self.positions)

    def add(self, name: str, original: str, rows: Taken) -> None:
        """Keep sampled rows under a name.  A module's second call is `name#2`."""
        self.calls[name] += 1
        number = self.calls[name]
        self.samples.append(_Sample(name if number == 1 else f"{name}#{number}", original, rows))

    def latest(self, name: str) -> Taken | None:
        """Rows of a module's last call so far."""
        return next((s.rows for s in reversed(self.samples) if s.name.partition("#")[0] == name), None)

    def records(self, labels: npt.NDArray[Any] | None, wanted: Callable[[str], bool]) -> list[Record]:
        """Row of phase `forward`: the positions, then every module in call order; empty if no module is wanted."""
        kept = np.arange(len(self.positions))
        if self.limit is not None:
            kept = self._kept(labels, self.limit)
        positions = self.positions[kept]
        records = [Record(POSITIONS, positions, "int64", positions.shape)]
        for sample in self.samples:
            if wanted(sample.name.partition("#")[0]):
                data = None if sample.rows.data is None else sample.rows.data[kept]
                shape = sample.rows.shape if data is None else data.shape
                records.append(
                    Record(sample.name, data, sample.rows.dtype, shape, sample.original, state=sample.rows.state)
                )
        return records if len(records) > 1 else []

    def _kept(self, labels: npt.NDArray[Any] | None, limit: int) -> npt.NDArray[np.intp]:
        """Indices of the positions that are kept now that the labels are known, or known to be unknown."""
        count = len(self.positions)
        if labels is None or labels.shape != self.shape:
            return np.arange(count) if count <= limit else np.arange(limit) * (count - 1) // max(1, limit - 1)
        have = {(int(row), int(at)): i for i, (row, at) in enumerate(self.positions)}
        for allowed in (limit, labels.size):
            asked = [(int(row), int(at)) for row, at in relevant_positions(labels, self.mask, allowed)]
            # Of a long batch not all may be there: then what there is of those that matter.
            found = [have[pair] for pair in asked if pair in have]
            if len(found) == len(asked) or allowed > limit:
                break
        return np.array(found[:limit], np.intp)


class Forwards:
    """Samples the forwards of one recording."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._open: Forward | None = None

    def begin(self, root: Any, prefix: str, batch: Sequence[Record]) -> Forward | None:
        """A root module is about to run on a micro-batch: hook its modules.  None if there is nothing to sample."""
        self.close()
        forward = _prepare(batch, self._recorder.options.forward_rows)
        if forward is None:
            self._recorder.observe("forward.unrecorded", "the model is not given a batch of token rows")
            return None
        # Before the first hook: should one of them fail, those before it are taken off again.
        self._open = forward
        inner = root._modules.get("_orig_mod")
        if inner is not None:
            self._recorder.observe("forward.unrecorded", COMPILED)
            if self._recorder.wants_module(HEAD):
                forward.handles.append(root.register_forward_hook(_Head(self._recorder, forward)))
        else:
            for name, module in self._modules(root, prefix):
                forward.handles.append(module.register_forward_hook(self._hook(forward, name, module)))
        # Called also when the forward raises.
        forward.handles.append(root.register_forward_hook(_End(self._recorder, self), always_call=True))
        return forward

    def close(self) -> None:
        """Take off the hooks of a forward that has returned, or raised."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _modules(self, root: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        """Modules to hook by their original names, without those in compiled parts."""
        hidden: set[int] = set()
        for name, module in root.named_modules():
            if id(module) in hidden or not name:
                continue
            compiled = "_orig_mod" in module._modules
            in_place = vars(module).get("_compiled_call_impl") is not None
            if compiled or in_place or _is_sealed(module):
                hidden |= {id(inner) for inner in module.modules()}
            if compiled or in_place:
                self._recorder.observe("forward.unrecorded", COMPILED_PARTS)
            if in_place or _is_sealed(module):
                continue
            canonical = self._recorder.names(prefix + name).name
            if self._is_wanted(canonical) and self._says_something(canonical, module):
                yield prefix + name, module

    def _is_wanted(self, name: str) -> bool:
        """Whether a module's output is recorded, or needed for what LoRA adds to it."""
        wants = self._recorder.wants_module
        return (
            wants(name)
            or wants(name + LORA_DELTA)
            or (name.endswith(BASE_LAYER) and wants(name.removesuffix(BASE_LAYER) + LORA_DELTA))
        )

    def _says_something(self, name: str, module: Any) -> bool:
        """Whether a module's output is more than that of those around it; what is asked for by name always is."""
        if name.endswith(LORA_DROPOUT):
            return _is_dropout(module) and module.p > 0
        return bool(self._recorder.options.modules) or not _is_plain_function(module)

    def _hook(self, forward: Forward, original: str, module: Any) -> Callable[..., None]:
        name = self._recorder.names(original).name
        children = module._modules
        adapted = "base_layer" in children and any(factor in children for factor in LORA_FACTORS)
        return _Module(self._recorder, forward, name, original, adapted=adapted)


class _Hook:
    """Forward hook.  A copy or a pickle of the module gets one that does nothing instead."""

    def __reduce__(self) -> tuple[Any, ...]:
        # It takes any arguments and returns None.
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Module(_Hook):
    """Samples the output of one module."""

    def __init__(self, recorder: Recorder, forward: Forward, name: str, original: str, *, adapted: bool) -> None:
        self._recorder = recorder
        self._forward = forward
        self._name = name
        self._original = original
        self._adapted = adapted

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 - torch's signature
        """The module has returned."""
        if _compiling():
            return
        with self._recorder.guard():
            rows = self._forward.rows(output)
            if rows is None:
                return
            base = self._forward.latest(self._name + BASE_LAYER) if self._adapted else None
            if base is not None:
                # Before the output that it is a part of.
                self._forward.add(self._name + LORA_DELTA, self._original, difference(rows, base))
            self._forward.add(self._name, self._original, rows)


class _Head(_Hook):
    """Samples the logits that a compiled model returns."""

    def __init__(self, recorder: Recorder, forward: Forward) -> None:
        self._recorder = recorder
        self._forward = forward

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 - torch's signature
        """The model has returned."""
        if _compiling():
            return
        with self._recorder.guard():
            found = output.get(LOGITS) if isinstance(output, Mapping) else output
            rows = self._forward.rows(found)
            if rows is not None:
                self._forward.add(HEAD, LOGITS, rows)


class _End(_Hook):
    """Takes the hooks off when the root module returns."""

    def __init__(self, recorder: Recorder, forwards: Forwards) -> None:
        self._recorder = recorder
        self._forwards = forwards

    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 - torch's signature
        """The root module has returned."""
        if not _compiling():
            with self._recorder.guard():
                self._forwards.close()


def _compiling() -> bool:
    import torch

    return bool(torch.compiler.is_compiling())


def _prepare(batch: Sequence[Record], limit: int) -> Forward | None:
    """A forward on a batch of token rows; None if it is of another kind."""
    known = {record.name: record for record in batch}
    ids, labels, mask = (
        known[name].data if name in known else None for name in ("input_ids", "labels", "attention_mask")
    )
    if ids is None or ids.ndim != 2:
        return None
    shape = (int(ids.shape[0]), int(ids.shape[1]))
    if labels is not None and labels.shape == ids.shape:
        return Forward(shape, relevant_positions(labels, mask, limit), None, mask)
    everything = np.zeros(shape, np.int64)
    return Forward(shape, relevant_positions(everything, mask, UNTIL_LABELS * limit), limit, mask)


def _is_plain_function(module: Any) -> bool:
    """Whether a module is a dropout or an activation, whatever it is called in its model."""
    return _is_dropout(module) or type(module).__module__ == "torch.nn.modules.activation"


def _is_dropout(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.modules.dropout._DropoutNd)


def _is_sealed(module: Any) -> bool:
    """Whether hooks inside a module would change how it computes (torch's fused encoders), or cannot be put there."""
    import torch

    fused = torch.nn.TransformerEncoder | torch.nn.TransformerEncoderLayer | torch.nn.MultiheadAttention
    return isinstance(module, torch.jit.ScriptModule) or (isinstance(module, fused) and not module.training)


def _first(output: Any, shape: tuple[int, int]) -> Any | None:
    """The first tensor [B, L, features] of an output; one that all rows share, as rotary tables are, is every row's."""
    rows, length = shape
    for value in output if isinstance(output, tuple | list) else (output,):
        if hasattr(value, "element_size") and value.ndim == 3 and value.shape[1] == length:
            if value.shape[0] == rows:
                return value
            if value.shape[0] == 1:
                return value.expand(rows, -1, -1)
    return None


def _rows(tensor: Any, positions: Positions) -> Taken:
    """Rows of a tensor [B, L, features] at some positions, copied: [n, features]."""
    import torch

    if is_distributed(tensor):
        # Picking rows of it would talk to the other processes, which may not be recording.
        return replace(unrecorded_like(tensor), shape=(len(positions), int(tensor.shape[2])))
    with torch.no_grad(), _without_modes():
        try:
            at = torch.from_numpy(positions).to(tensor.device)
            return take(tensor.detach()[at[:, 0], at[:, 1]])
        except (RuntimeError, TypeError, NotImplementedError):
            # A tensor subclass whose rows cannot be picked.
            return replace(unrecorded_like(tensor), shape=(len(positions), int(tensor.shape[2])))


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    """Hide what we do from a mode that watches the operations of a forward (selective checkpointing counts them)."""
    import torch
    from torch.utils import _python_dispatch as dispatch

    if torch._C._len_torch_dispatch_stack() == 0:
        yield
        return
    with dispatch._disable_current_modes():
        yield


def difference(output: Taken, base: Taken) -> Taken:
    """What LoRA has added, in the run's dtype; unrecorded where a side of it is."""
    if output.data is None or base.data is None or output.shape != base.shape:
        return replace(output, data=None, state=State.UNRECORDED)
    if BFLOAT16 not in (output.dtype, base.dtype):
        return replace(output, data=output.data - base.data.astype(output.data.dtype))
    found = to_numpy(output.data, output.dtype).astype(np.float32) - to_numpy(base.data, base.dtype).astype(np.float32)
    rounded = float32_to_bf16(found) if output.dtype == BFLOAT16 else found.astype(output.data.dtype)
    return replace(output, data=rounded)


def token_losses(
    original: Callable[..., Any], logits: Any, target: Any, ignored: int, shape: tuple[int, int]
) -> npt.NDArray[np.float32] | None:
    """-log p of each supervised token, float32 [B, L] aligned with the labels; None if the targets are of another shape.

    `original`: torch's own cross_entropy.  `logits`: [N, V] as the program gave them to it, N = B L or B (L - 1): those at
    position t predict the token at t + 1.
    """
    import torch

    rows, length = shape
    if target.is_floating_point() or logits.ndim != 2 or target.ndim != 1 or length < 2:
        return None
    if is_distributed(logits) or is_distributed(target) or target.numel() not in (rows * length, rows * (length - 1)):
        return None
    with torch.no_grad(), _without_modes():
        parts = [
            original(
                logits[i : i + TOKENS].detach().float(), target[i : i + TOKENS], ignore_index=ignored, reduction="none"
            )
            for i in range(0, target.numel(), TOKENS)
        ]
        values = torch.cat(parts).cpu().numpy().reshape(rows, -1)[:, : length - 1]
    found = np.zeros(shape, np.float32)
    found[:, 1:] = values
    return found


@dataclass(slots=True)
class MicroBatch:
    """A training forward: its batch, outputs of its modules, the loss of each token if asked for and seen, the model's mode."""

    batch: list[Record]
    forward: Forward | None = None
    token_loss: npt.NDArray[np.float32] | None = None
    training: Mode | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `input_ids`; empty where there are none."""
        return next((record.shape for record in self.batch if record.name == "input_ids"), ())

    def forward_records(self, wanted: Callable[[str], bool]) -> list[Record]:
        """Row of phase `forward`, empty if nothing was sampled."""
        labels = next((record.data for record in self.batch if record.name == "labels"), None)
        return [] if self.forward is None else self.forward.records(labels, wanted)

    def token_loss_record(self) -> Record:
        """Record `token_loss`; unrecorded where the program's loss was not torch's cross-entropy."""
        if self.token_loss is None:
            return Record(TOKEN_LOSS, None, "float32", self.shape, state=State.UNRECORDED)
        return Record(TOKEN_LOSS, self.token_loss, "float32", self.token_loss.shape)
