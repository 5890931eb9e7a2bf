"""Causes: what the findings come from, each a small pure function in a module of its own.

A module has `ID` (or `IDS`, a family) and `find(context)`, which returns the causes that it can show, possibly none.  A
new one is one file and one line here.  Their order is that of preference: where two explain a finding equally well, the
one that comes first, the more specific one, is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Final

from differ.causes import (
    batch_mask,
    batch_order,
    batch_padding,
    batch_shift,
    clip,
    clip_ranks,
    config_differs,
    corrupt_elements,
    forward,
    grad_absent,
    grad_mean_of_means,
    grad_scale,
    grad_stale,
    init_draw,
    init_frozen,
    init_names,
    init_scale,
    init_swapped,
    layout_permutation,
    layout_transpose,
    lora_scale,
    loss_precision,
    loss_reduction,
    notes,
    optimizer_betas,
    optimizer_bias_correction,
    optimizer_eps,
    optimizer_rule,
    optimizer_state_reset,
    optimizer_weight_decay,
    precision_overflow,
    precision_rounding,
    rng_dropout,
    schedule_lr,
    sign,
)
from differ.causes.context import Context
from differ.causes.select import choose
from differ.result import Cause, Verdict

# Causes of findings, the more specific ones first.
FINDERS: Final[tuple[ModuleType, ...]] = (
    init_names,
    init_swapped,
    init_frozen,
    layout_transpose,
    layout_permutation,
    sign,
    init_scale,
    init_draw,
    schedule_lr,
    batch_shift,
    batch_padding,
    batch_mask,
    batch_order,
    forward,
    lora_scale,
    loss_precision,
    loss_reduction,
    grad_absent,
    grad_mean_of_means,
    grad_stale,
    grad_scale,
    clip,
    clip_ranks,
    optimizer_state_reset,
    optimizer_rule,
    optimizer_betas,
    optimizer_bias_correction,
    optimizer_weight_decay,
    optimizer_eps,
    precision_rounding,
    precision_overflow,
    rng_dropout,
    corrupt_elements,
    config_differs,
)

# What is worth knowing with or without a finding: systematic effects within tolerance.
NOTES: Final[tuple[ModuleType, ...]] = (notes,)


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found to say: causes of the divergence, and notes where there is none."""

    causes: tuple[Cause, ...]
    notes: tuple[Cause, ...]

    @property
    def settings(self) -> bool:
        """Whether any setting differs."""
        return any(cause.id == config_differs.ID for cause in (*self.causes, *self.notes))


def ids() -> tuple[str, ...]:
    """The ids of all causes and notes, in order of registration."""
    found = (getattr(module, "IDS", None) or (module.ID,) for module in (*FINDERS, *NOTES))
    return tuple(dict.fromkeys(str(name) for family in found for name in family))


def explain(context: Context, verdict: Verdict) -> Explanation:
    """Run all finders.  Without a divergence a difference of settings is a note: it changed nothing."""
    causes = choose(_claims(FINDERS, context), context.findings)
    notes = tuple(_claims(NOTES, context))
    return Explanation(causes, notes) if verdict is Verdict.DIVERGED else Explanation((), (*causes, *notes))


def _claims(modules: tuple[ModuleType, ...], context: Context) -> list[Cause]:
    return [cause for module in modules for cause in module.find(context)]
