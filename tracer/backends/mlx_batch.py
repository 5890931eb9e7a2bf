"""What a loss function was given, in the convention of Hugging Face: `input_ids`, `labels`, `tokens`.

Pure numpy.  A loss function's own arguments are recognised by the names of its parameters, and what they are taken for is
checked against the numbers: a shift against the ids, a mask against the token count that the loss function returned.
Invariant: what is not recognised is kept under `args.N` as it is; labels are never guessed against the evidence.

    labels[b, t] = token t of row b if it is supervised (predicted from t - 1), else -100; column 0 is always -100
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

IGNORED: Final = -100
# A token id where the run has none: behind the last input of a row whose last target is not supervised.
NO_TOKEN: Final = 0

IDS: Final = frozenset({"input_ids", "batch", "inputs", "input", "x", "tokens", "ids"})
TARGETS: Final = frozenset({"targets", "target", "y"})
LABELS: Final = frozenset({"labels"})
MASK: Final = frozenset({"mask", "loss_mask", "weights"})
LENGTHS: Final = frozenset({"lengths"})
AS_NAMED: Final = frozenset({"attention_mask", "position_ids"})

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Argument:
    """One array that the loss function was given: where (`0`, `1.input_ids`), under which parameter name, its value.

    bfloat16 values are their uint16 bits; `dtype` is that of the run.
    """

    position: str
    name: str
    value: npt.NDArray[Any]
    dtype: str


@dataclass(frozen=True, slots=True)
class Named:
    """One record of the batch phase: name, value, dtype of the run."""

    name: str
    value: npt.NDArray[Any]
    dtype: str


@dataclass(frozen=True, slots=True)
class Count:
    """The second value that the loss function returned: the number of supervised positions.

    Certain if it is an integer; a float may be something else (an accuracy of 1.0).
    """

    value: int
    certain: bool


def map_batch(arguments: Sequence[Argument], *, returned: Count | None = None) -> list[Named]:
    """Records of one micro-batch.

    `returned` decides between readings of `lengths`; labels that contradict a certain one are not recorded.
    """
    given = _Given.of(arguments)
    count = returned.value if returned is not None else None
    if returned is not None and not returned.certain:
        known = None if given.ids is None else _supervision(given, count)[1]
        count = count if known is not None else None
    if given.ids is None:
        return [*_leftover(arguments, used=()), *_tokens(count)]
    ids, labels = _supervision(given, count)
    used = [given.ids, *given.named]
    records = [Named("input_ids", ids, "int64")]
    if labels is not None:
        records.append(Named("labels", labels, "int64"))
        used += [a for a in (given.labels, given.lengths, given.mask) if a is not None]
        count = int(np.count_nonzero(labels != IGNORED))
    records += [Named(argument.name, argument.value, argument.dtype) for argument in given.named]
    records += _leftover(arguments, used=used)
    if given.mask in used and given.mask is not None and not _is_binary(given.mask.value):
        # Weights other than 0 and 1 say more than the labels can.
        records.append(Named(f"args.{given.mask.position}", given.mask.value, given.mask.dtype))
    return [*records, *_tokens(count)]


@dataclass(frozen=True, slots=True)
class _Given:
    """Arguments by role.  `shifted`: the labels' name says that they are the next tokens, not the tokens."""

    ids: Argument | None
    labels: Argument | None
    shifted: bool
    mask: Argument | None
    lengths: Argument | None
    named: tuple[Argument, ...]

    @classmethod
    def of(cls, arguments: Sequence[Argument]) -> _Given:
        tokens = [a for a in arguments if a.value.ndim == 2 and a.value.dtype.kind in "iu"]
        ids = _first(tokens, IDS)
        labels, targets = _first(tokens, LABELS), _first(tokens, TARGETS)
        if ids is None and labels is None and targets is None:
            # Names say nothing; two arrays of tokens, one the other shifted by one, say it themselves.
            unknown = [a for a in tokens if a.name.lower() not in MASK | LENGTHS | AS_NAMED]
            if len(unknown) == 2 and _is_next(unknown[0].value, unknown[1].value):
                ids, targets = unknown
        mask = _first([a for a in arguments if a.value.ndim == 2], MASK)
        lengths = _first([a for a in arguments if a.value.ndim in (1, 2)], LENGTHS)
        named = tuple(a for a in arguments if a.name.lower() in AS_NAMED and a is not ids)
        return cls(ids, labels or targets, labels is None, mask, lengths, named)


def _supervision(given: _Given, count: int | None) -> tuple[Ints, Ints | None]:
    """Ids [B, W] and labels [B, W], or None where it is not known what is supervised."""
    assert given.ids is not None
    ids = given.ids.value.astype(np.int64)
    if given.labels is not None:
        made = _from_labels(ids, given.labels.value.astype(np.int64), shifted=given.shifted)
        if made is None:
            return ids, None
        ids, labels = made
    elif given.mask is not None or given.lengths is not None or count == ids[:, 1:].size:
        labels = ids.copy()
        labels[:, :1] = IGNORED
    else:
        return ids, None
    for candidate in _narrowed(labels, given):
        if count is None or int(np.count_nonzero(candidate != IGNORED)) == count:
            return ids, candidate
    return given.ids.value.astype(np.int64), None


def _from_labels(ids: Ints, given: Ints, *, shifted: bool) -> tuple[Ints, Ints] | None:
    """Ids and labels of the same width from ids [B, L] and what the loss compares with, or None if shapes do not fit."""
    rows, width = ids.shape
    ignored = np.full((rows, 1), IGNORED, np.int64)
    if given.shape == (rows, width - 1):
        return ids, np.hstack([ignored, _clean(given)])
    if given.shape != ids.shape:
        return None
    same, following = _agree(ids, given), _is_next(ids, given)
    if same != following:
        shifted = following
    labels = _clean(given)
    if not shifted:
        labels[:, :1] = IGNORED
        return ids, labels
    last = labels[:, -1:]
    if bool(np.all(last == IGNORED)):
        return ids, np.hstack([ignored, labels[:, :-1]])
    return np.hstack([ids, np.where(last == IGNORED, NO_TOKEN, last)]), np.hstack([ignored, labels])


def _narrowed(labels: Ints, given: _Given) -> Iterator[Ints]:
    """Readings of mask and lengths, the likeliest first, as labels with fewer supervised positions."""
    if given.mask is not None:
        keep = _target_columns(given.mask.value, labels.shape)
        if keep is None:
            return
        labels = _only(labels, keep)
    if given.lengths is None:
        yield labels
        return
    lengths = given.lengths.value.astype(np.int64)
    if lengths.shape[0] != labels.shape[0] or (lengths.ndim == 2 and lengths.shape[1] != 2):
        return
    low, high = (
        (lengths[:, :1], lengths[:, 1:]) if lengths.ndim == 2 else (np.zeros_like(lengths)[:, None], lengths[:, None])
    )
    step = np.arange(1, labels.shape[1])[None, :]
    # mlx-lm's default_loss includes both ends, and with the upper one a position of padding.
    for upper in (step <= high, step < high):
        yield _only(labels, (step >= low) & upper)


def _target_columns(mask: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[np.bool_] | None:
    """Mask over the target columns 1..W-1 from one over targets or over tokens; None if its shape fits neither."""
    rows, width = shape
    if mask.shape == (rows, width):
        mask = mask[:, 1:]
    return np.not_equal(mask, 0) if mask.shape == (rows, width - 1) else None


def _only(labels: Ints, keep: npt.NDArray[np.bool_]) -> Ints:
    narrowed = labels.copy()
    narrowed[:, 1:][~keep] = IGNORED
    return narrowed


def _clean(labels: Ints) -> Ints:
    """Labels with every ignored position (negative) as -100."""
    return np.where(labels < 0, IGNORED, labels)


def _agree(ids: npt.NDArray[Any], labels: npt.NDArray[Any]) -> bool:
    """Whether supervised labels are the tokens at their own position."""
    return bool(np.all((labels < 0) | (labels == ids)))


def _is_next(ids: npt.NDArray[Any], labels: npt.NDArray[Any]) -> bool:
    """Whether supervised labels are the tokens at the next position."""
    return ids.shape == labels.shape and _agree(ids[:, 1:], labels[:, :-1])


def _is_binary(mask: npt.NDArray[Any]) -> bool:
    return bool(np.all((mask == 0) | (mask == 1)))


def _first(arguments: Sequence[Argument], names: frozenset[str]) -> Argument | None:
    return next((a for a in arguments if a.name.lower() in names), None)


def _leftover(arguments: Sequence[Argument], used: Sequence[Argument]) -> list[Named]:
    return [Named(f"args.{a.position}", a.value, a.dtype) for a in arguments if not any(a is u for u in used)]


def _tokens(count: int | None) -> list[Named]:
    return [] if count is None else [Named("tokens", np.array(count, np.int64), "int64")]
