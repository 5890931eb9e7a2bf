"""One small training run for each optimizer of MLX: `mlx_optimizers.py FOLDER CASE …`.

Writes FOLDER/<case>.h5.  `NAME@` is the same on data and from weights of its own, and `NAME@SETTING` besides takes its steps
with that setting 1 % larger than the optimizer says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

import tracer

STEPS = 3

CASES: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optim.SGD(0.1),
    "sgd-momentum": lambda: optim.SGD(0.1, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": lambda: optim.SGD(0.1, momentum=0.9, nesterov=True),
    "sgd-dampening": lambda: optim.SGD(0.1, momentum=0.9, dampening=0.2),
    "adamax": lambda: optim.Adamax(0.01),
    "rmsprop": lambda: optim.RMSprop(0.01),
    "adagrad": lambda: optim.Adagrad(0.05),
    "adadelta": lambda: optim.AdaDelta(0.5),
    "lion": lambda: optim.Lion(0.01, weight_decay=0.01),
    "adafactor": lambda: optim.Adafactor(weight_decay=0.01),
    "adafactor-lr": lambda: optim.Adafactor(0.01, beta_1=0.9, relative_step=False, scale_parameter=False),
    "muon": lambda: optim.Muon(0.02),
    "muon-plain": lambda: optim.Muon(0.02, nesterov=False, weight_decay=0.0),
}


class Model(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 5)

    def __call__(self, values: mx.array) -> mx.array:
        return self.down(mx.tanh(self.up(values)))


def changed(optimizer: Any, setting: str) -> None:
    """From now on a step of this optimizer uses a setting that is 1 % larger than it says."""
    apply_single = type(optimizer).apply_single

    def larger(self: Any, gradient: Any, parameter: Any, state: dict[str, Any]) -> Any:
        kept = getattr(self, setting)
        # A beta is moved by 1 % of what it takes in: 0.99 is 0.9899.
        setattr(self, setting, (kept[0], 1 - (1 - kept[1]) * 1.01) if setting == "betas" else kept * 1.01)
        new = apply_single(self, gradient, parameter, state)
        setattr(self, setting, kept)
        return new

    optimizer.__class__ = type(type(optimizer).__name__, (type(optimizer),), {"apply_single": larger})


def loss_fn(model: Model, values: mx.array, targets: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(values), targets).mean()


def train(case: str, path: Path) -> None:
    name, other, setting = case.partition("@")
    mx.random.seed(1 if other else 0)
    model, optimizer = Model(), CASES[name]()
    if setting:
        changed(optimizer, setting)
    with tracer.record(path):
        value_and_grad = nn.value_and_grad(model, loss_fn)
        # Not compiled: a kernel would be built for every optimizer.
        for _ in range(STEPS):
            loss, gradients = value_and_grad(model, mx.random.normal((8, 12)), mx.random.randint(0, 5, (8,)))
            optimizer.update(model, gradients)
            mx.eval(loss, model.state, optimizer.state)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for chosen in sys.argv[2:]:
        train(chosen, folder / f"{chosen}.h5")
