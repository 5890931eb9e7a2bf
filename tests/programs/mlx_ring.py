"""A hand-written MLX loop for one process, or for the ranks of mlx.launch, which average their gradients: `mlx_ring.py [RESULT]`.

Each rank takes its share of the rows of every step.  With RESULT, rank 0 leaves a fingerprint there.
"""

from __future__ import annotations

import sys
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_common import leave, rows

VOCABULARY, WIDTH, STEPS, ROWS = 29, 8, 3, 4


class Model(nn.Module):
    """Embedding, one layer, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, 12)
        self.up = nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, VOCABULARY, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.lm_head(mx.tanh(self.up(self.embed_tokens(ids))))


def loss_fn(model: Model, inputs: mx.array, targets: mx.array) -> mx.array:
    """Mean over all positions."""
    return nn.losses.cross_entropy(model(inputs), targets).mean()


def main() -> None:
    """Train."""
    group = mx.distributed.init()
    mx.random.seed(3)
    model = Model()
    optimizer = optim.AdamW(learning_rate=1e-2)
    state = [model.state, optimizer.state]
    value_and_grad = nn.value_and_grad(model, loss_fn)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(inputs: mx.array, targets: mx.array) -> mx.array:
        loss, gradients = value_and_grad(model, inputs, targets)
        optimizer.update(model, nn.average_gradients(gradients, group))
        return loss

    losses = []
    for ids in rows(STEPS, ROWS, WIDTH, VOCABULARY):
        share = mx.array(np.split(ids, group.size())[group.rank()])
        losses.append(step(share[:, :-1], share[:, 1:]))
        mx.eval(losses, state)
    if len(sys.argv) > 1 and group.rank() == 0:
        leave(sys.argv[1], losses=[loss.item() for loss in losses], model=model, optimizer=optimizer)


if __name__ == "__main__":
    main()
