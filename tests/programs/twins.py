"""Small loops that the recorder can make a twin of: `twins.py LOOP`.  Written as users write them."""

from __future__ import annotations

import sys
from functools import partial


def torch_loop() -> None:
    """SGD on one trained and one frozen matrix, in bfloat16 and float32; evaluated once before training."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, dtype=torch.bfloat16), torch.nn.Linear(5, 3, bias=False))
    model[1].weight.requires_grad_(False)
    model.forward = lambda x: model[1](model[0](x).float())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    data = torch.ones(2, 6, dtype=torch.bfloat16)
    with torch.no_grad():
        model.eval()(data)
    model.train()
    for _ in range(2):
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def mlx_loop(compiled: bool) -> None:
    """SGD on one trained and one frozen matrix, the step compiled over the model's state or eager."""
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False))
    model.layers[0].set_dtype(mx.bfloat16)
    model.layers[1].freeze()
    optimizer = optim.SGD(learning_rate=0.0)
    value_and_grad = nn.value_and_grad(model, lambda x: model(x).square().mean())
    state = [model.state, optimizer.state]

    def step(x: mx.array) -> mx.array:
        loss, gradients = value_and_grad(x)
        optimizer.update(model, gradients)
        return loss

    if compiled:
        step = partial(mx.compile, inputs=state, outputs=state)(step)
    for _ in range(2):
        mx.eval(step(mx.ones((2, 6))), state)


def mlx_functional() -> None:
    """Parameters in the program's own hands: there is no model whose start could be moved."""
    import mlx.core as mx
    import mlx.optimizers as optim

    mx.set_default_device(mx.cpu)
    optimizer = optim.SGD(learning_rate=0.1)
    parameters = {"w": mx.ones((3,))}
    for _ in range(2):
        _, gradients = mx.value_and_grad(lambda p: (p["w"] ** 2).sum())(parameters)
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)


if __name__ == "__main__":
    loops = {
        "torch": torch_loop,
        "mlx": partial(mlx_loop, True),
        "mlx-eager": partial(mlx_loop, False),
        "mlx-functional": mlx_functional,
        "fails": lambda: sys.exit(7),
    }
    loops[sys.argv[1]]()
