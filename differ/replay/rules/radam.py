"""RAdam: Adam whose step size is rectified while the second moment rests on few gradients.

    rho_max   2 / (1 - b2) - 1                      rho = rho_max - 2 t b2^t / (1 - b2^t)
    rho > 5   lr m^ r sqrt(1 - b2^t) / (sqrt(v) + eps),   r^2 = (rho-4)(rho-2) rho_max / ((rho_max-4)(rho_max-2) rho)
    else      lr m^                                 m^ = m / (1 - b1^t)

Source: torch.optim.RAdam; Liu et al. 2020, arXiv:1908.03265.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final

import numpy as np

from differ.compare import Float64
from differ.replay.rules.adam import FIRST_MOMENT, MOMENT_RULES, SECOND_MOMENT, running_mean
from differ.replay.rules.base import Choices, Family, Hyper, Replayed, rules

# Above this length the second moment is used.
RECTIFIED: Final = 5.0


class RAdam(Family):
    """See the module."""

    name = "radam"
    updates = rules("radam", decay=("none", "decoupled"))
    moments: ClassVar = {FIRST_MOMENT: MOMENT_RULES, SECOND_MOMENT: MOMENT_RULES}
    words: ClassVar = {("optimizer", "radam"): "RAdam"}

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """Both moments."""
        del hyper
        return kinds == {FIRST_MOMENT, SECOND_MOMENT}

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """The corrected mean, rectified."""
        del choices, w
        hyper = inputs.hyper
        mean = hyper.lr / (1.0 - hyper.beta1**hyper.step) * inputs.state(FIRST_MOMENT, start)
        correction = 1.0 - hyper.beta2**hyper.step
        longest = 2.0 / (1.0 - hyper.beta2) - 1.0
        length = longest - 2.0 * hyper.step * hyper.beta2**hyper.step / correction
        if not length > RECTIFIED:
            return mean
        square = (length - 4.0) * (length - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * length)
        root = np.sqrt(inputs.state(SECOND_MOMENT, start))
        update: Float64 = mean * math.sqrt(square * correction) / (root + hyper.eps)
        return update

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """Those of Adam."""
        return running_mean(inputs, choices, start)
