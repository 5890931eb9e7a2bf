"""`lora.scale`: the two sides multiply their adapters by different factors (alpha against alpha / rank, rsLoRA, a default).

    y = W x + s B A x    dL/dB = s (dL/dy) (A x)^T    dL/dA = s B^T (dL/dy) x^T

While B is 0 the outputs and losses are equal to the bit, dL/dA is 0 on both sides, and dL/dB alone carries the factor:
grad(B)_b / grad(B)_a = s_b / s_a.  Adam hides it from the first update (ratio 1).  Found in the effective scale that is
recorded at init, else in the gradients of the first step.  Undone: b's scales, or gradients, divided by the one factor.
Sources: Hu et al. 2021, arXiv:2106.09685, section 4.1; mlx-vlm #845; rsLoRA (alpha / sqrt(rank)) arXiv:2312.03732.
"""

from __future__ import annotations

from typing import Final

from differ.causes.constants import name_factor, short
from differ.causes.context import Context
from differ.causes.fit import SHOWN, RatioFit, squared
from differ.causes.grad_scale import scaled_sets
from differ.inputs import LORA_B, LORA_SCALE
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "lora.scale"


def find(context: Context) -> list[Cause]:
    """One cause for the scales at init, or one for the gradients of `lora_B`."""
    return [*_recorded(context), *_seen(context)]


def _recorded(context: Context) -> list[Cause]:
    """From the effective scales: one factor over all modules whose scale differs, or one cause for each factor."""
    groups: dict[float, list[str]] = {}
    fits: dict[float, RatioFit] = {}
    sides: dict[float, tuple[float, float]] = {}
    for name in context.suspects(Phase.INIT, 0):
        both = context.pair(Phase.INIT, 0, name) if name.endswith(LORA_SCALE) else None
        if both is None or not (both[0] != 0.0).all():
            continue
        a, b = float(both[0].reshape(-1)[0]), float(both[1].reshape(-1)[0])
        key = short(b / a)
        groups.setdefault(key, []).append(name)
        fits.setdefault(key, RatioFit()).add(*both)
        sides.setdefault(key, (a, b))
    causes = []
    for key, names in groups.items():
        a, b = sides[key]
        matches = name_factor(context, 0, key)
        summary = f"LoRA scale: b {short(b):g}, a {short(a):g}" + _factor(key, matches)
        parameters = {
            "factor": key,
            "a": short(a),
            "b": short(b),
            "matches": matches,
            "gradients": _confirmed(context, key),
        }
        causes.append(
            Cause(
                ID, summary, step=0, phase=Phase.INIT.label, names=tuple(names), parameters=parameters,
                explains=fits[key].share,
            )
        )  # fmt: skip
    return causes


def _confirmed(context: Context, factor: float) -> bool | None:
    """Whether the gradients of B at the first step carry the factor; None where they cannot tell."""
    fit = RatioFit()
    names = [name for name in context.differing(Phase.GRAD, 1) if name.endswith(LORA_B)]
    if not names or not all(_is_zero(context, 1, name) for name in names):
        return None
    for name in names:
        both = context.pair(Phase.GRAD, 1, name)
        if both is not None:
            fit.add(*both)
    return fit.share >= SHOWN and abs(fit.ratio / factor - 1.0) <= 1e-3


def _seen(context: Context) -> list[Cause]:
    """From the gradients: a factor in `lora_B` and nowhere else, while B is 0, and no recorded scale that says otherwise."""
    causes = []
    for step, _, _ in context.groups(Phase.GRAD):
        for scaled in scaled_sets(context, step):
            names = scaled.names
            if not all(name.endswith(LORA_B) and _is_zero(context, step, name) for name in names):
                continue
            if any(_scale_agrees(context, name) for name in names):
                continue
            factor = scaled.fit.ratio
            matches = name_factor(context, step, factor, scaled.fit.error)
            summary = (
                f"LoRA scale: gradients of lora_B differ while B is 0, those of lora_A do not{_factor(factor, matches)}"
            )
            parameters = {"factor": short(factor), "matches": matches}
            causes.append(
                Cause(
                    ID, summary, step=step, phase=Phase.GRAD.label, names=tuple(names), parameters=parameters,
                    explains=scaled.fit.share,
                )
            )  # fmt: skip
    return causes


def _factor(factor: float, matches: str) -> str:
    big, small = ("b", "a") if factor > 1.0 else ("a", "b")
    return f" ({big} {max(factor, 1.0 / factor):.6g} times {small}" + (f": {matches})" if matches else ")")


def _is_zero(context: Context, step: int, name: str) -> bool:
    """Whether a parameter is all zero on both sides before a step."""
    phase, at = (Phase.INIT, 0) if step <= 1 else (Phase.PARAM, step - 1)
    both = context.pair(phase, at, name)
    return both is not None and squared(both[0]) == 0.0 and squared(both[1]) == 0.0


def _scale_agrees(context: Context, name: str) -> bool:
    scales = [context.scalar(side, Phase.INIT, 0, name.removesuffix(LORA_B) + LORA_SCALE) for side in "ab"]
    return scales[0] is not None and scales[1] is not None and short(scales[0]) == short(scales[1])
