"""Causes: what the findings come from, each a small pure function in a module of its own.

A module has `ID` (or `IDS`, a family) and `find(context)`, which returns the causes that it can show, possibly none.  A
new one is one file and one line here.  Their order is that of preference: where two explain a finding equally well, the
one that comes first, the more specific one, is shown.

A cause is about findings of its own step and phase (`choose` drops every other), so a finder is imported and asked only
where something was found in a phase that it is about: two traces that agree cost none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Final

from differ.causes.config_differs import ID as SETTINGS
from differ.causes.context import Context
from differ.causes.select import choose
from differ.result import Cause, Verdict
from tracer.schema import Phase

# Phases that hold tensors of floats, as `differ.causes.records` asks of them.
_TENSORS: Final = (Phase.INIT, Phase.FORWARD, Phase.GRAD, Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM)
_ANY: Final = tuple(Phase)

# Module -> the phases that its causes are about; None: it is asked whatever was found, and where nothing was.
_Register = Mapping[str, tuple[Phase, ...] | None]

# Causes of findings, the more specific ones first.
FINDERS: Final[_Register] = {
    "init_names": (Phase.INIT,),
    "init_swapped": (Phase.INIT,),
    "init_frozen": (Phase.INIT,),
    "layout_transpose": _TENSORS,
    "layout_permutation": _TENSORS,
    "sign": _TENSORS,
    "init_scale": (Phase.INIT,),
    "init_draw": (Phase.INIT,),
    "optimizer_groups": (Phase.HPARAMS,),
    "schedule_lr": (Phase.HPARAMS,),
    "batch_shift": (Phase.BATCH,),
    "batch_padding": (Phase.BATCH,),
    "batch_positions": (Phase.BATCH,),
    "batch_mask": (Phase.BATCH,),
    "batch_order": (Phase.BATCH,),
    "forward_rotary": (Phase.FORWARD,),
    "forward_activation": (Phase.FORWARD,),
    "forward": (Phase.FORWARD,),
    "lora_scale": (Phase.INIT, Phase.GRAD),
    "loss_precision": (Phase.LOSS,),
    "loss_shift": (Phase.LOSS,),
    "loss_reduction": (Phase.LOSS,),
    "grad_absent": (Phase.GRAD,),
    "grad_mean_of_means": (Phase.GRAD,),
    "grad_stale": (Phase.GRAD,),
    "grad_scale": (Phase.GRAD,),
    "optimizer_unheld": (Phase.CLIPPED_GRAD, Phase.OPT_STATE, Phase.PARAM),
    "clip": (Phase.CLIPPED_GRAD,),
    "clip_ranks": (Phase.CLIPPED_GRAD,),
    "optimizer_state_reset": (Phase.OPT_STATE,),
    "param_not_updated": (Phase.PARAM,),
    "optimizer_rule": (Phase.HPARAMS, Phase.OPT_STATE, Phase.PARAM),
    "optimizer_betas": (Phase.HPARAMS, Phase.OPT_STATE, Phase.PARAM),
    "optimizer_bias_correction": (Phase.PARAM,),
    "optimizer_weight_decay": (Phase.HPARAMS, Phase.OPT_STATE, Phase.PARAM),
    "optimizer_eps": (Phase.HPARAMS, Phase.PARAM),
    "precision_rounding": _TENSORS,
    "precision_overflow": _ANY,
    "rng_dropout": (Phase.FORWARD, Phase.GRAD),
    "model_mode": (Phase.FORWARD, Phase.LOSS, Phase.GRAD),
    "corrupt_elements": (*_TENSORS, Phase.BATCH),
    "config_differs": None,
}

# What is worth knowing with or without a cause: systematic effects within tolerance.
NOTES: Final[_Register] = {"notes": None, "forward_growth": (Phase.FORWARD,)}


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found to say: causes of the divergence, and notes where there is none."""

    causes: tuple[Cause, ...]
    notes: tuple[Cause, ...]

    @property
    def settings(self) -> bool:
        """Whether any setting differs."""
        return any(cause.id == SETTINGS for cause in (*self.causes, *self.notes))


def module_of(name: str) -> ModuleType:
    """The module of a finder, imported when it is asked for."""
    return importlib.import_module(f"{__name__}.{name}")


def ids() -> tuple[str, ...]:
    """The ids of all causes and notes, in order of registration; imports all of them."""
    modules = map(module_of, (*FINDERS, *NOTES))
    found = (getattr(module, "IDS", None) or (module.ID,) for module in modules)
    return tuple(dict.fromkeys(str(name) for family in found for name in family))


def explain(context: Context, verdict: Verdict) -> Explanation:
    """Run the finders.  Without a divergence a difference of settings is a note: it changed nothing."""
    causes = choose(_claims(FINDERS, context), context.findings)
    notes = tuple(_claims(NOTES, context))
    return Explanation(causes, notes) if verdict is Verdict.DIVERGED else Explanation((), (*causes, *notes))


def _claims(modules: _Register, context: Context) -> list[Cause]:
    found = {Phase.parse(finding.phase) for finding in context.findings}
    asked = (name for name, about in modules.items() if about is None or not found.isdisjoint(about))
    return [cause for name in asked for cause in module_of(name).find(context)]
