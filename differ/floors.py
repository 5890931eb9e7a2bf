"""Norms below which a record holds rounding noise only, whatever a tolerance says.

Pure functions of two rows and their recorded statistics; no tensor is read.
"""

from __future__ import annotations

import math
from typing import Final

from differ.align import Row
from tracer.names import BASE_LAYER, LORA_DELTA
from tracer.schema import Phase

# Tensors smaller than this share of the phase's norm hold noise only.
NOISE_SHARE: Final = 1e-6
LOSS_FLOOR: Final = 1.0


def smallest_norm(phase: Phase, a: Row, b: Row) -> float:
    """Norm below which a tensor of this row holds rounding noise only; the floor of every relative error."""
    if phase is not Phase.GRAD:
        return LOSS_FLOOR if phase in (Phase.LOSS, Phase.EVAL) else 0.0
    return NOISE_SHARE * max(math.hypot(*(float(l2) for l2 in row.view.stats[:, 0])) for row in (a, b))


def delta_norm(phase: Phase, a: Row, b: Row, name: str) -> float:
    """Norm of the output that a LoRA delta was subtracted from, whose noise it has; 0 for every other record."""
    if phase is not Phase.FORWARD or LORA_DELTA not in name:
        return 0.0
    outputs = (name.replace(LORA_DELTA, ""), name.replace(LORA_DELTA, BASE_LAYER))
    return max((row.l2(output) for row in (a, b) for output in outputs if output in row.positions), default=0.0)
