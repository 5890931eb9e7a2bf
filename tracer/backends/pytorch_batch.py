"""A micro-batch as the model was given it, in the convention of Hugging Face.

`labels` are unshifted: labels[:, t] is the token at t, predicted from t-1; -100 is not supervised, and column 0, which
nothing predicts, always is.  What is recorded is copied at the call, before the model can touch it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tracer.backends.pytorch_tensors import Taken, scalar, take, unrecorded
from tracer.schema import Record, State

IGNORED: Final = -100
# What a language model is fed with; its other integer arguments are derived from these.
TOKEN_INPUTS: Final = ("input_ids", "attention_mask", "position_ids")
LABELS: Final = ("labels", "shift_labels")


def named_arguments(root: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module by name; those that its signature has no name for are `args.<i>`."""
    named = dict(kwargs)
    if not args:
        return named
    forward = _unwrapped(root).forward
    try:
        parameters = [
            p.name
            for p in inspect.signature(forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        parameters = []
    for i, value in enumerate(args):
        named[parameters[i] if i < len(parameters) else f"args.{i}"] = value
    return named


def _unwrapped(root: Any) -> Any:
    """The module inside torch.compile's and DDP's wrappers, whose own forward takes anything."""
    while True:
        children = root._modules
        inner = children.get("_orig_mod") or (children.get("module") if len(children) == 1 else None)
        if inner is None:
            return root
        root = inner


def batch_records(arguments: Mapping[str, Any], fallback: Mapping[str, Any]) -> list[Record]:
    """Records of one micro-batch.  `fallback`: what the trainer drew, for labels that it kept from the model."""
    import torch

    tensors = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    if "input_ids" not in tensors and not _is_token_batch(fallback):
        return [_named(name, take(value)) for name, value in tensors.items() if value.ndim or len(tensors) == 1]
    for name in (*TOKEN_INPUTS, *LABELS):
        if name not in tensors and isinstance(fallback.get(name), torch.Tensor):
            tensors[name] = fallback[name]
    records = [_named(name, take(tensors[name])) for name in TOKEN_INPUTS if name in tensors]
    # Images, audio, ready-made embeddings.
    records += [_named(n, take(v)) for n, v in tensors.items() if v.is_floating_point() and v.ndim]
    return records + _label_records(tensors)


def _is_token_batch(batch: Mapping[str, Any]) -> bool:
    return "input_ids" in batch


def _label_records(tensors: Mapping[str, Any]) -> list[Record]:
    """`labels` and `tokens`, the number of supervised positions."""
    ids = take(tensors["input_ids"])
    labels = _unshifted(tensors, ids)
    if labels.data is None:
        return [_named("labels", labels), unrecorded("tokens", "int64")]
    return _known_labels(labels)


def _known_labels(labels: Taken) -> list[Record]:
    return [_named("labels", labels), scalar("tokens", int(np.count_nonzero(labels.data != IGNORED)), "int64")]


def _unshifted(tensors: Mapping[str, Any], ids: Taken) -> Taken:
    """Labels [B, L] in the convention of this module, from `labels` or `shift_labels`."""
    missing = Taken(None, "int64", ids.shape, State.UNRECORDED)
    if "labels" in tensors:
        labels = take(tensors["labels"])
        if labels.data is not None and labels.shape == ids.shape and labels.data.ndim == 2:
            labels.data[:, 0] = IGNORED
        return labels
    if "shift_labels" not in tensors:
        return missing
    shifted = take(tensors["shift_labels"])
    if shifted.data is None or shifted.data.ndim != 2 or np.any(shifted.data[:, -1] != IGNORED):
        return missing
    return replace(shifted, data=np.roll(shifted.data, 1, axis=1))


def with_targets(batch: list[Record], target: Any, *, ignored: int, whole: bool) -> list[Record]:
    """The batch with what the program's own cross-entropy was given, if the model was given no labels.

    `target`: class indices of any shape.  `whole`: the loss was reduced there and then, so that no mask can have been
    applied to it afterwards.  Targets that are not the inputs shifted by one are kept as they are, as `args.<i>`.
    """
    ids = next((r.data for r in batch if r.name == "input_ids"), None)
    open_ = any(r.name == "labels" and r.state is State.UNRECORDED for r in batch)
    if ids is None or not open_:
        return batch
    taken = take(target)
    labels = _labels_from(taken.data, ids, ignored) if whole and taken.data is not None else None
    if labels is None:
        return [*batch, _named(f"args.{sum(r.name.startswith('args.') for r in batch)}", taken)]
    kept = [r for r in batch if r.name not in ("labels", "tokens")]
    return kept + _known_labels(Taken(labels, "int64", labels.shape))


def _labels_from(target: npt.NDArray[Any], ids: npt.NDArray[Any], ignored: int) -> npt.NDArray[np.int64] | None:
    """Labels [B, L] from flat targets, where position t of `ids` was to predict the token at t + 1."""
    if ids.ndim != 2 or target.dtype.kind not in "iu":
        return None
    rows, length = ids.shape
    if target.size == rows * length:
        target = target.reshape(rows, length)
        if np.any(target[:, -1] != ignored):
            return None
        target = target[:, :-1]
    elif target.size != rows * (length - 1):
        return None
    following = target.reshape(rows, length - 1)
    supervised = following != ignored
    if not np.array_equal(following[supervised], ids[:, 1:][supervised]):
        return None
    labels = np.full(ids.shape, IGNORED, np.int64)
    labels[:, 1:][supervised] = following[supervised]
    return labels


def _named(name: str, taken: Taken) -> Record:
    return Record(name, taken.data, taken.dtype, taken.shape, state=taken.state)
