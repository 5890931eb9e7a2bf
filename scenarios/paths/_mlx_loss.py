"""The losses of the MLX paths, each with the arrays that it is given of a micro-batch.

`mlx`: masked cross-entropy of float32 logits, written out here.  `mlx-lm`: `mlx_lm.tuner.trainer.default_loss`.
`unsloth-mlx`: unsloth's fused cross-entropy, or its plain one with `loss.precision = "model"`.  Every one returns (mean over the
supervised positions, their number), so that any loop can take any of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scenarios.config import RunConfig
from scenarios.data import IGNORED, MicroBatch
from scenarios.feed import Feed
from tracer.errors import BadConfig

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Loss:
    """`function(model, *arrays)`, and the arrays of a micro-batch; `by_lengths`: those are ids and lengths."""

    function: Callable[..., tuple[Any, Any]]
    arrays: Callable[[MicroBatch], tuple[Ints, ...]]
    by_lengths: bool = True


def masked(config: RunConfig) -> Loss:
    """The hand-written loss."""
    return Loss(masked_loss if config.loss.precision != "model" else _masked_loss_as_is, _ids_and_labels, False)


def mlx_lm(config: RunConfig, feed: Feed) -> Loss:
    """mlx-lm's own; the hand-written one where its stretches cannot say what is supervised, and a line on stderr."""
    from mlx_lm.tuner.trainer import default_loss

    if config.loss.precision == "float32" and config.model.dtype != "float32":
        raise BadConfig("loss.precision: mlx-lm's loss is taken in the dtype of the logits", 'use parts.loss = "mlx"')
    if feed.steps is not None and any(supervised_stretch(micro_batch) is None for micro_batch in feed.each()):
        print("mlx-lm: a row's supervised positions are not one stretch, using a masked loss", file=sys.stderr)
        return masked(config)
    return Loss(default_loss, lambda micro_batch: (micro_batch.input_ids, _stretch(micro_batch)))


def unsloth(config: RunConfig, model: Any) -> Loss:
    """unsloth's: fused, or of logits."""
    from unsloth_zoo.mlx.utils import make_baseline_loss_fn, make_cce_loss_fn

    if config.loss.precision == "float32":
        raise BadConfig(
            "loss.precision: unsloth has a fused loss and one in the model's dtype", 'use "library" or "model"'
        )
    function = make_baseline_loss_fn() if config.loss.precision == "model" else make_cce_loss_fn(model)
    return Loss(function, half_open)


def masked_loss(model: Any, input_ids: Any, labels: Any) -> tuple[Any, Any]:
    """Mean cross-entropy over the supervised positions of [B, L] ids, and their number.

    Position t is predicted from those before it; logits go to float32 first, as transformers does.
    """
    import mlx.core as mx

    return _cross_entropy(model(input_ids[:, :-1]).astype(mx.float32), labels)


def _masked_loss_as_is(model: Any, input_ids: Any, labels: Any) -> tuple[Any, Any]:
    """The same in the dtype of the logits."""
    return _cross_entropy(model(input_ids[:, :-1]), labels)


def _cross_entropy(logits: Any, labels: Any) -> tuple[Any, Any]:
    import mlx.core as mx
    import mlx.nn as nn

    targets = labels[:, 1:]
    supervised = targets != IGNORED
    each = nn.losses.cross_entropy(logits, mx.where(supervised, targets, 0)) * supervised
    count = supervised.sum()
    return each.sum() / count, count


def _ids_and_labels(micro_batch: MicroBatch) -> tuple[Ints, ...]:
    return micro_batch.input_ids, micro_batch.labels


def half_open(micro_batch: MicroBatch) -> tuple[Ints, ...]:
    """Ids and [B, 2] stretches whose end is not included; labels too where stretches cannot say it."""
    stretch = supervised_stretch(micro_batch)
    if stretch is not None:
        return micro_batch.input_ids, stretch + np.array([[0, 1]])
    whole = np.tile(np.array([[0, micro_batch.labels.shape[1]]]), (len(micro_batch.labels), 1))
    return micro_batch.input_ids, whole, micro_batch.labels


def _stretch(micro_batch: MicroBatch) -> Ints:
    stretch = supervised_stretch(micro_batch)
    assert stretch is not None, "asked before"
    return stretch


def supervised_stretch(micro_batch: MicroBatch) -> Ints | None:
    """[B, 2] first and last supervised position of each row, as mlx-lm's loss counts them (both inclusive).

    None where that cannot say it: a row with a hole, or labels that are not the tokens.  A row without any is (1, 0).
    """
    supervised = micro_batch.supervised
    result = np.zeros((len(supervised), 2), np.int64)
    for row, flags in enumerate(supervised):
        at = np.flatnonzero(flags)
        result[row] = (at[0], at[-1]) if at.size else (1, 0)
        if at.size and at[-1] - at[0] + 1 != at.size:
            return None
    equal = np.array_equal(micro_batch.labels[supervised], micro_batch.input_ids[supervised])
    return result if equal else None
