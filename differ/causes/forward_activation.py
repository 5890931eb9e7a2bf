"""`forward.activation`: the two sides apply different activation functions to what they got.

    gelu        x Φ(x)                          gelu_tanh   x / 2 (1 + tanh(√(2/π) (x + 0.044715 x³)))
    quick_gelu  x σ(1.702 x)                    silu        x σ(x)
    relu        max(x, 0)                       relu2       max(x, 0)²

x is an output of the same side that was recorded before, in the same module and of the same shape (`mlp.gate_proj` before
`mlp.act_fn`), and each side's function must give its output element by element, to within its dtype's rounding.  Undone: each
side's own input under the other's function, sum |recorded - f_other(x)|^2 against sum |recorded - f_own(x)|^2.

Source: GELU by its exact formula in place of the one by tanh, up to 4.7e-4 apart (transformers #29402).  Only where the
activation was recorded: `--modules '*'` or `'*act_fn'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from differ.causes.context import Context, Float64
from differ.causes.fit import SHOWN, Sums, squared
from differ.causes.words import number
from differ.result import Cause
from tracer.dtypes import EPSILON
from tracer.schema import WHOLE_STEP, Phase

ID: Final = "forward.activation"

# Units in the last place of the output (and of the input, where the output is small) that a function may miss by.
CLOSE: Final = 8.0


def _sigmoid(x: Float64) -> Float64:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _gelu(x: Float64) -> Float64:
    erf = np.fromiter(map(math.erf, (x.reshape(-1) / math.sqrt(2.0)).tolist()), np.float64, x.size).reshape(x.shape)
    return 0.5 * x * (1.0 + erf)


def _gelu_tanh(x: Float64) -> Float64:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


FUNCTIONS: Final[dict[str, Callable[[Float64], Float64]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "relu": lambda x: np.maximum(x, 0.0),
    "relu2": lambda x: np.square(np.maximum(x, 0.0)),
}
WORDS: Final = {
    "gelu": "GELU (exact)",
    "gelu_tanh": "GELU (tanh)",
    "quick_gelu": "GELU (1.702)",
    "silu": "SiLU",
    "relu": "ReLU",
    "relu2": "ReLU²",
}


def find(context: Context) -> list[Cause]:
    """At most one cause, for the first module output with a finding."""
    findings = context.findings_in(Phase.FORWARD)
    if not findings or findings[0].name is None:
        return []
    first = findings[0]
    assert first.name is not None
    at = WHOLE_STEP if first.micro_batch is None else first.micro_batch
    outputs = context.pair(Phase.FORWARD, first.step, first.name, at)
    dtypes = {context.dtype(side, Phase.FORWARD, first.step, first.name, at) for side in "ab"}
    epsilon = EPSILON.get(next(iter(dtypes)) or "", 0.0)
    if outputs is None or len(dtypes) != 1:
        return []
    for given, inputs in _inputs(context, first.step, at, first.name):
        own = _functions(inputs, outputs, epsilon) if inputs[0].shape == outputs[0].shape else None
        if own is not None and (share := _share(inputs, outputs, own)) >= SHOWN:
            apart = max(float(np.abs(FUNCTIONS[own[0]](x) - FUNCTIONS[own[1]](x)).max()) for x in inputs)
            summary = (
                f"{first.name} is {WORDS[own[0]]} of {given.rpartition('.')[2]} in a, {WORDS[own[1]]} in b: "
                f"up to {number(apart, 2)} apart"
            )
            parameters: dict[str, Any] = {"a": own[0], "b": own[1], "of": given}
            return [Cause(ID, summary, None, first.step, Phase.FORWARD.label, (first.name,), parameters, share)]
    return []


def _inputs(context: Context, step: int, at: int, name: str) -> Iterator[tuple[str, tuple[Float64, Float64]]]:
    """Outputs beside a module that were recorded before it, the nearest last module first."""
    around = name.rpartition(".")[0] + "."
    names = context.names("a", Phase.FORWARD, step, at)
    before = names[: names.index(name)] if name in names else ()
    for given in reversed(before):
        if given.startswith(around) and "." not in given.removeprefix(around):
            both = context.pair(Phase.FORWARD, step, given, at)
            if both is not None:
                yield given, both


def _functions(
    inputs: tuple[Float64, Float64], outputs: tuple[Float64, Float64], epsilon: float
) -> tuple[str, str] | None:
    """The functions of both sides; None if a side's is not known, or they are one."""
    a, b = (_function(x, y, epsilon) for x, y in zip(inputs, outputs, strict=True))
    return None if a is None or b is None or a == b else (a, b)


def _function(x: Float64, y: Float64, epsilon: float) -> str | None:
    """The function that gives an output, element by element; None if none or more than one does."""
    allowed = CLOSE * epsilon * np.maximum(np.abs(x), np.abs(y))
    with np.errstate(invalid="ignore", over="ignore"):
        found = [name for name, of in FUNCTIONS.items() if bool((np.abs(of(x) - y) <= allowed).all())]
    return found[0] if len(found) == 1 else None


def _share(inputs: tuple[Float64, Float64], outputs: tuple[Float64, Float64], own: tuple[str, str]) -> float:
    sums = Sums()
    for x, y, mine, other in zip(inputs, outputs, own, own[::-1], strict=True):
        sums += Sums(squared(y - FUNCTIONS[other](x)), squared(y - FUNCTIONS[mine](x)))
    return sums.share
