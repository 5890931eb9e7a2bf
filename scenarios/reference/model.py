"""The model of a trace, rebuilt in torch: the base by name, checked weight by weight, and the adapters as recorded.

    LoRA    y = W x + b + scale * B (A dropout(x))        A [rank, in], B [out, rank], scale as recorded
    DoRA    y = m / |W + scale * B A| * (W x + scale * B (A x)) + b        row norms, taken as constants in the gradient

Everything is computed in one dtype, whatever the run's own was; a base that the run held in bfloat16 is rounded to that first.
Invariant: no weight of the base goes unchecked.  One that the trace has no digest of, or that differs, is an error by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from differ.reference import NoReference
from scenarios.models import model_source
from scenarios.reference.recorded import FACTORS, IGNORED, LORA_A, LORA_B, MAGNITUDE, Adapter, Batch, Recorded
from tracer.errors import PackageMissing, TraceError

_DROPOUTS: Final = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop")


class Reference:
    """The rebuilt model of one trace."""

    def __init__(self, model: Any, parameters: dict[str, Any], source: str, dtype: Any, dropout: float) -> None:
        self._model = model
        self._parameters = parameters
        self._dtype = dtype
        self.source = source
        self.dropout = dropout

    @property
    def engine(self) -> str:
        """`torch 2.13.0`."""
        import torch

        return f"torch {torch.__version__.partition('+')[0]}"

    def load(self, values: Iterable[tuple[str, npt.NDArray[Any]]]) -> None:
        """Set trained parameters, by canonical name and in canonical layout."""
        import torch

        with torch.no_grad():
            for name, value in values:
                self._parameters[name].copy_(torch.from_numpy(np.array(value)))

    def restore(self, generator: npt.NDArray[np.uint8]) -> None:
        """Set torch's generator to a recorded state."""
        import torch

        torch.set_rng_state(torch.from_numpy(np.array(generator)))

    def _tensor(self, value: npt.NDArray[Any]) -> Any:
        import torch

        tensor = torch.from_numpy(np.array(value))
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def sums(self, batch: Batch) -> tuple[float, dict[str, npt.NDArray[Any]]]:
        """Summed cross-entropy over the supervised tokens of a micro-batch, and its gradient by name.

        A parameter that the loss does not reach has no entry.
        """
        import torch

        inputs = {name: self._tensor(value) for name, value in batch.inputs.items() if name != "labels"}
        labels = torch.from_numpy(np.array(batch.inputs["labels"]))[:, 1:].reshape(-1)
        logits = self._model(**inputs, use_cache=False).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum")
        grads = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        named = zip(self._parameters, grads, strict=True)
        return float(loss.detach()), {name: grad.numpy() for name, grad in named if grad is not None}


@contextmanager
def rebuilt(recorded: Recorded, dtype: str, model: str | None) -> Iterator[Reference]:
    """The model of a trace.  `model`: folder, hub id or tiny model instead of the one that the trace names.

    Raises NoReference with the reason, PackageMissing without torch.
    """
    torch = _torch()
    source = _source(recorded, model)
    base = _load(source)
    _check_names(recorded, base, source)
    _check_frozen(recorded, base, source)
    kind = getattr(torch, dtype)
    base.to(kind)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    own = dict(base.named_parameters())
    parameters = {name: own[name] for name in recorded.trainable if name in own}
    parameters |= _adapt(recorded, base, kind)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    dropout = max(recorded.dropout, _own_dropout(base) if recorded.framework != "mlx" else 0.0)
    base.train(dropout > 0.0)
    ordered = {name: parameters[name] for name in recorded.trainable}
    state = torch.get_rng_state()
    try:
        yield Reference(base, ordered, source, kind, dropout)
    finally:
        torch.set_rng_state(state)


def _torch() -> Any:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise PackageMissing("the reference needs torch and transformers", "install steptrace[torch]") from error
    transformers.utils.logging.disable_progress_bar()
    return torch


def _source(recorded: Recorded, model: str | None) -> str:
    name = model or recorded.trace.declared.get("model.name")
    if not isinstance(name, str) or not name:
        raise NoReference(
            f"{recorded.trace.path} does not say which base model it trained", "give it: --model FOLDER or a hub id"
        )
    try:
        return model_source(name)
    except TraceError as error:
        raise NoReference(f"base model: {error}", "give it: --model FOLDER or a hub id") from error


def _load(source: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise NoReference(
            f"base model {_short(source)} cannot be loaded: {reason}", "give another: --model FOLDER or a hub id"
        ) from error


def _check_names(recorded: Recorded, base: Any, source: str) -> None:
    """The weights of the trace, without adapters, must be those of the base, in name and shape."""
    own = {name: tuple(parameter.shape) for name, parameter in base.named_parameters()}
    wanted = {name: weight.shape for name, weight in recorded.frozen.items()}
    wanted |= {name: entry.shape for name, entry in recorded.trainable.items() if not name.endswith(FACTORS)}
    extra = [name for name in wanted if name not in own]
    missing = [name for name in own if name not in wanted]
    if extra or missing:
        parts = [f"{len(extra)} weights of the trace are not in it ({_some(extra)})"] if extra else []
        parts += [f"{len(missing)} of its weights are not in the trace ({_some(missing)})"] if missing else []
        raise _wrong(recorded, source, "; ".join(parts))
    shapes = [name for name, shape in wanted.items() if own[name] != tuple(shape)]
    if shapes:
        first = shapes[0]
        raise _wrong(recorded, source, f"{first} has shape {list(own[first])}, in the trace {list(wanted[first])}")
    absent = [a.module for a in recorded.adapters if f"{a.module}.weight" not in own]
    if absent:
        raise _wrong(recorded, source, f"adapters sit on modules that it does not have ({_some(absent)})")


def _check_frozen(recorded: Recorded, base: Any, source: str) -> None:
    """Round each frozen weight to the dtype of the run and compare its digest with the recorded one."""
    import torch

    different, unknown = [], []
    own = dict(base.named_parameters())
    for name, frozen in recorded.frozen.items():
        if frozen.digest is None:
            unknown.append(name)
            continue
        with torch.no_grad():
            own[name].data = own[name].data.to(getattr(torch, frozen.dtype))
        if _digest(own[name].data) != frozen.digest:
            different.append(name)
    if different:
        raise _wrong(
            recorded, source, f"{len(different)} of {len(recorded.frozen)} frozen weights differ ({_some(different)})"
        )
    if unknown:
        raise NoReference(f"{recorded.trace.path} has no digest of {len(unknown)} frozen weights ({_some(unknown)})")


def _digest(tensor: Any) -> bytes:
    import torch

    return bytes(xxhash.xxh3_128_digest(tensor.contiguous().view(-1).view(torch.uint8).numpy().data))


def _wrong(recorded: Recorded, source: str, how: str) -> NoReference:
    return NoReference(
        f"{_short(source)} is not the base that {recorded.trace.path} was trained on: {how}",
        "give the right one: --model FOLDER or a hub id",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _short(source: str) -> str:
    """A source without the folders above it: a hub id as it is."""
    return Path(source).name if Path(source).is_absolute() else source


def _adapt(recorded: Recorded, base: Any, dtype: Any) -> dict[str, Any]:
    """Put the recorded LoRA modules into the base; their parameters by canonical name."""
    import torch

    found: dict[str, Any] = {}
    layer = _lora_layer()
    for adapter in recorded.adapters:
        names = FACTORS if adapter.dora else (LORA_A, LORA_B)
        shapes = {factor: recorded.trainable[adapter.module + factor].shape for factor in names}
        factors = {factor: torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for factor, shape in shapes.items()}
        parent, _, child = adapter.module.rpartition(".")
        owner = base.get_submodule(parent)
        inner = getattr(owner, child)
        _check_fit(recorded, adapter, inner, shapes)
        setattr(owner, child, layer(inner, factors, adapter.scale, recorded.dropout))
        found |= {adapter.module + factor: parameter for factor, parameter in factors.items()}
    return found


def _check_fit(recorded: Recorded, adapter: Adapter, inner: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    import torch

    if not isinstance(inner, torch.nn.Linear):
        raise NoReference(
            f"{recorded.trace.path} adapts {adapter.module}, a {type(inner).__name__}: only Linear is rebuilt"
        )
    if shapes[LORA_A] != (adapter.rank, inner.in_features) or shapes[LORA_B] != (inner.out_features, adapter.rank):
        raise NoReference(
            f"{adapter.module} is [{inner.out_features}, {inner.in_features}], its factors are "
            f"{list(shapes[LORA_A])} and {list(shapes[LORA_B])}"
        )


def _lora_layer() -> type[Any]:
    import torch

    class Lora(torch.nn.Module):  # type: ignore[misc]
        """A linear layer and its low-rank addition; dropout draws as PEFT's does, once a call before A."""

        def __init__(self, base: Any, factors: dict[str, Any], scale: float, dropout: float) -> None:
            super().__init__()
            self.base, self.scale = base, scale
            self.a, self.b, self.m = factors[LORA_A], factors[LORA_B], factors.get(MAGNITUDE)
            self.dropout = torch.nn.Dropout(dropout) if dropout > 0.0 else torch.nn.Identity()

        def forward(self, x: Any) -> Any:
            linear = torch.nn.functional.linear
            delta = linear(linear(self.dropout(x), self.a), self.b) * self.scale
            if self.m is None:
                return self.base(x) + delta
            norm = torch.linalg.norm(self.base.weight + self.scale * self.b @ self.a, dim=1).detach()
            scaled = (self.m / norm) * (linear(x, self.base.weight) + delta)
            return scaled if self.base.bias is None else scaled + self.base.bias

    return Lora


def _own_dropout(base: Any) -> float:
    """Largest dropout of the base model itself."""
    import torch

    rates = [module.p for module in base.modules() if isinstance(module, torch.nn.Dropout)]
    config = base.config.get_text_config()
    rates += [rate for name in _DROPOUTS if isinstance(rate := getattr(config, name, None), int | float)]
    return max((float(rate) for rate in rates if math.isfinite(rate)), default=0.0)
