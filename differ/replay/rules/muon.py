"""Muon: the momentum of a matrix, made orthogonal by Newton-Schulz.

    buffer    mu buffer' + (1 - mu) g                       averaged (torch, MLX); mu buffer' + g summed
    u         (1 - mu) g + mu buffer with Nesterov, else the buffer
    X         u / |u|; five times X <- a X + (b A + c A A) X with A = X X^T; the shorter side first
    step      lr s X      s = sqrt(max(1, rows / columns)) "original", the same of the transpose, 0.2 sqrt(max(rows, columns))
              "adamw", or 1
    decay     decoupled (torch) or added to the gradient (MLX)

torch iterates in bfloat16, MLX in the dtype of the run.  The former is replayed with every intermediate result rounded: to the
bit for matrices of up to 64 x 64; in larger ones (512 x 512, random and of rank 4) the order of the sums moves X by up to 1.3 %,
in directions of its own, and its length by 1.5e-4.  So X as a whole is judged there, and its length; what an iteration in the
dtype of the run gives is not taken for one in bfloat16.  A scalar or vector is not made orthogonal.

Sources: torch.optim.Muon, mlx.optimizers.Muon; Jordan et al. 2024, kellerjordan.github.io/posts/muon.
"""

from __future__ import annotations

import math
from typing import ClassVar, Final

import numpy as np

from differ.align import BLOCK
from differ.compare import Float64
from differ.replay.rules.base import ADDED, Choices, Family, Hyper, Replayed, Rule, rule, rules
from tracer.dtypes import bf16_to_float32, float32_to_bf16

BUFFER: Final = "momentum_buffer"
COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
# Share of its root mean square that the step may be off by.
_NOISE: Final = {"bfloat16": 0.03, "full": 6e-5}
_LENGTH: Final = 1e-3


class Muon(Family):
    """See the module."""

    name = "muon"
    elementwise = False
    updates = rules(
        "muon",
        size=("original", "transposed", "adamw", "none"),
        nesterov=("yes", "no"),
        iterated=("bfloat16", "full"),
        decay=("decoupled", "coupled", "none"),
    )
    moments: ClassVar = {BUFFER: rules("muon", taken=("averaged", "summed"), decay=ADDED)}
    words: ClassVar = {
        ("optimizer", "muon"): "Muon",
        ("size", "original"): "steps scaled by √max(1, rows/columns)",
        ("size", "transposed"): "steps scaled by √max(1, columns/rows)",
        ("size", "adamw"): "steps scaled by 0.2 √max(rows, columns)",
        ("size", "none"): "steps not scaled by the shape",
        ("iterated", "bfloat16"): "Newton-Schulz in bfloat16",
        ("iterated", "full"): "Newton-Schulz in the dtype of the run",
        ("taken", "averaged"): "momentum averaged",
        ("taken", "summed"): "momentum summed",
    }

    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """One buffer, and a number of iterations."""
        return kinds == {BUFFER} and "ns_steps" in hyper.more

    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """lr s X."""
        x = _orthogonal(inputs, choices).reshape(-1)[start : start + w.size]
        update: Float64 = inputs.hyper.lr * _size(inputs.after.shape, choices["size"]) * x
        return update

    def slack(self, inputs: Replayed, choices: Choices, start: int, update: Float64) -> Float64 | float:
        """What the order of the sums in the iteration moves."""
        del inputs, start
        size = math.sqrt(float(np.mean(np.square(update)))) if update.size else 0.0
        return _NOISE[choices["iterated"]] * size

    def length(self, choices: Choices) -> float | None:
        """That of an iteration in bfloat16."""
        return _LENGTH if choices["iterated"] == "bfloat16" else None

    def closer(self, choices: Choices) -> Rule | None:
        """Of an iteration in bfloat16 the one in the dtype of the run."""
        return None if self.length(choices) is None else rule(**{**choices, "iterated": "full"})

    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """The buffer."""
        momentum = inputs.hyper.momentum
        taken = 1.0 - momentum if choices["taken"] == "averaged" else 1.0
        return momentum * inputs.before.block(start, start + BLOCK), taken * inputs.g(start, choices)


def _size(shape: tuple[int, ...], way: str) -> float:
    if len(shape) < 2 or way == "none":
        return 1.0
    rows, columns = shape[-2], shape[-1]
    if way == "adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns if way == "original" else columns / rows))


def _orthogonal(inputs: Replayed, choices: Choices) -> Float64:
    """X of the momentum, in the parameter's shape."""
    coupled = choices["decay"] == "coupled" and inputs.hyper.weight_decay != 0.0
    key = ("muon", choices["nesterov"], choices["iterated"], coupled)
    found: Float64 = inputs.held.remember(key, lambda: _compute(inputs, choices))
    return found


def _compute(inputs: Replayed, choices: Choices) -> Float64:
    shape, momentum = inputs.after.shape, inputs.hyper.momentum
    parts = []
    for start in inputs.after.blocks():
        buffer = inputs.state(BUFFER, start)
        nesterov = choices["nesterov"] == "yes"
        parts.append((1.0 - momentum) * inputs.g(start, choices) + momentum * buffer if nesterov else buffer)
    u = np.concatenate(parts).reshape(shape)
    if u.ndim < 2:
        return u
    x = newton_schulz(u.reshape(shape[0], -1), inputs.hyper, rounded=choices["iterated"] == "bfloat16")
    return x.reshape(shape)


def newton_schulz(u: Float64, hyper: Hyper, *, rounded: bool) -> Float64:
    """The iteration, in float64; `rounded`: each result to bfloat16, as matrix products in bfloat16 leave it."""
    keep = _round if rounded else np.asarray
    a, b, c = (hyper.get(f"ns_coefficients{i}", default) for i, default in enumerate(COEFFICIENTS, 1))
    eps = hyper.eps or 1e-7
    x = keep(u)
    if x.shape[0] > x.shape[1]:
        x = x.T
    norm = float(keep(np.array([np.linalg.norm(x)])).item())
    # torch takes the larger of norm and eps, MLX their sum.
    x = keep(x / (max(norm, eps) if rounded else norm + eps))
    for _ in range(int(hyper.get("ns_steps", 5.0))):
        gram = keep(x @ x.T)
        inner = keep(b * gram + c * (gram @ gram))
        x = keep(a * x + inner @ x)
    return np.asarray(x.T if u.shape[0] > u.shape[1] else x)


def _round(values: Float64) -> Float64:
    return bf16_to_float32(float32_to_bf16(values.astype(np.float32))).astype(np.float64)
