"""One small training run for each optimizer of PyTorch and transformers: `torch_optimizers.py FOLDER CASE …`.

Writes FOLDER/<case>.h5.  `NAME@` is the same on data and from weights of its own, and `NAME@SETTING` besides takes its steps
with that setting 1 % larger than the optimizer says.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.optimization import Adafactor as HfAdafactor

import tracer

STEPS = 3

optim = torch.optim
CASES: dict[str, Callable[[list[Any]], Any]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd-dampening": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2),
    "adam": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.0, betas=(0.9, 0.9)),
    "amsgrad": lambda p: optim.AdamW(p, lr=0.01, amsgrad=True),
    "adamax": lambda p: optim.Adamax(p, lr=0.01, weight_decay=0.01),
    "nadam": lambda p: optim.NAdam(p, lr=0.01, weight_decay=0.01, decoupled_weight_decay=True),
    "radam": lambda p: optim.RAdam(p, lr=0.01, betas=(0.9, 0.9)),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01),
    "rmsprop-centered": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, weight_decay=0.01),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1),
    "adagrad-zero": lambda p: optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.5, weight_decay=0.01),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01, weight_decay=0.01),
    "adafactor-hf": lambda p: HfAdafactor(p, weight_decay=0.01),
    "adafactor-hf-lr": lambda p: HfAdafactor(p, lr=0.01, beta1=0.9, relative_step=False, scale_parameter=False),
    "muon": lambda p: optim.Muon(p, lr=0.02),
    "muon-adamw": lambda p: optim.Muon(p, lr=0.02, nesterov=False, adjust_lr_fn="match_rms_adamw"),
}


class Model(torch.nn.Module):
    """Two linear layers, with biases where the optimizer takes vectors."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.up = torch.nn.Linear(12, 16, bias=bias)
        self.down = torch.nn.Linear(16, 5, bias=bias)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(values)))


def changed(optimizer: Any, setting: str) -> None:
    """From now on a step of this optimizer uses a setting that is 1 % larger than its groups say."""
    step = type(optimizer).step

    @contextmanager
    def larger() -> Iterator[None]:
        kept = [group[setting] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            value = group[setting]
            # A beta is moved by 1 % of what it takes in: 0.999 is 0.99899.
            group[setting] = (value[0], 1 - (1 - value[1]) * 1.01) if setting == "betas" else value * 1.01
        yield
        for group, value in zip(optimizer.param_groups, kept, strict=True):
            group[setting] = value

    def stepped(self: Any, closure: Any = None) -> Any:
        with larger():
            return getattr(step, "__wrapped__", step)(self, closure)

    # Only an optimizer's constructor gives its class the hooks.
    stepped = optim.Optimizer.profile_hook_step(stepped)
    optimizer.__class__ = type(type(optimizer).__name__, (type(optimizer),), {"step": stepped})


def train(case: str, path: Path) -> None:
    name, other, setting = case.partition("@")
    torch.manual_seed(1 if other else 0)
    model = Model(bias="muon" not in name)
    optimizer = CASES[name](list(model.parameters()))
    if setting:
        changed(optimizer, setting)
    with tracer.record(path):
        for _ in range(STEPS):
            values, targets = torch.randn(8, 12), torch.randint(0, 5, (8,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(values), targets).backward()
            optimizer.step()


if __name__ == "__main__":
    torch.set_num_threads(1)
    # The recorder looks for live models among all objects, once a run; these are none.
    gc.freeze()
    folder = Path(sys.argv[1])
    for chosen in sys.argv[2:]:
        train(chosen, folder / f"{chosen}.h5")
