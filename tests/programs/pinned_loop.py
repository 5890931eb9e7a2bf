"""A hand-written MLX loop over four small packages of its own: `tidy` clips the gradients, the others change nothing.

The packages come from an environment that is made for the test; see tests/scenarios/bisect/make_environment.py.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import names_of
import numpy as np
import padding
import report_line
import tidy


def loss_fn(model: Any, ids: Any, targets: Any) -> Any:
    return nn.losses.cross_entropy(model(ids), targets).mean()


mx.random.seed(0)
model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
optimizer = optim.SGD(learning_rate=0.1)
loss_and_gradient = nn.value_and_grad(model, loss_fn)
for step, ids in enumerate(np.random.RandomState(7).randint(0, 16, (2, 4, 6)), start=1):
    padded = mx.array(padding.pad(ids))
    loss, gradients = loss_and_gradient(model, padded[:, :-1], padded[:, 1:])
    optimizer.update(model, tidy.clip(gradients))
    mx.eval(model.parameters(), optimizer.state)
    print(report_line.line(names_of.run(), step, loss.item()))
