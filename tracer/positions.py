"""Positions of a micro-batch at which the outputs of modules are recorded.

A module's output has a row for every token; only those that can reach the loss are worth storing, and of a long batch only some.
The choice depends on the labels and the mask alone, never on how long the rows were padded, so that two runs that pad differently
keep the same ones.  Must never import a framework: every backend asks this one function.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

IGNORED: Final = -100


def relevant_positions(
    labels: npt.NDArray[Any], attention_mask: npt.NDArray[Any] | None, limit: int
) -> npt.NDArray[np.int64]:
    """(row, position) of what to record of a micro-batch, int64[n, 2] with n <= limit, ascending.

    `labels`: integers [B, L], unshifted; -100 is not supervised.  `attention_mask`: [B, L], 0 at padding; a mask of another shape
    tells nothing of positions and is passed over.  A position can reach the loss if it is not padding and lies before the
    last supervised label of its row, since the output at t predicts the token at t + 1.  More than `limit` of them are
    thinned out evenly, the first and the last kept.
    """
    supervised = labels != IGNORED
    length = labels.shape[1]
    # Index of the last supervised label of each row; 0, which has nothing before it, where there is none.
    last = np.where(supervised.any(axis=1), length - 1 - np.argmax(supervised[:, ::-1], axis=1), 0) if length else 0
    matters = np.arange(length)[None, :] < np.reshape(last, (-1, 1))
    if attention_mask is not None and attention_mask.shape == labels.shape:
        matters &= attention_mask != 0
    found = np.argwhere(matters).astype(np.int64)
    if len(found) <= limit:
        return found
    return found[np.arange(limit) * (len(found) - 1) // max(1, limit - 1)]
