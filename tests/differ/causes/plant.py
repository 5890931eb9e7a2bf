"""Faults to plant in synthetic runs beside those of `tests.builders`, and the look of what a diff says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from differ import Cause, DiffResult, diff
from tests.builders import F32, record
from tracer.schema import Phase, Record, Row

Edit = Callable[[Row], Row | None]
Tamper = Callable[[int, dict[str, np.ndarray]], None]

LAYERS = (0, 1, 2)


def factor(layer: int, kind: str) -> str:
    """Name of a LoRA factor of the synthetic model."""
    return f"model.layers.{layer}.self_attn.q_proj.lora_{kind}.weight"


A = tuple(factor(layer, "A") for layer in LAYERS)
B = tuple(factor(layer, "B") for layer in LAYERS)


def causes(result: DiffResult, cause_id: str) -> list[Cause]:
    return [cause for cause in result.causes if cause.id == cause_id]


def ids(result: DiffResult) -> list[str]:
    return [cause.id for cause in result.causes if cause.id != "config.differs"]


def mirrored(folder: Path) -> DiffResult:
    """The same pair with a and b in each other's place."""
    return diff(folder / "b.h5", folder / "a.h5")


def scaled(by: float, *, at: Iterable[int] = (1, 2, 3), names: str = "") -> Tamper:
    """Multiply gradients."""

    def tamper(step: int, grads: dict[str, np.ndarray]) -> None:
        for name in grads:
            if step in set(at) and names in name:
                grads[name] = (grads[name] * F32(by)).astype(F32)

    return tamper


def uncleared(at: int, *, names: str = "") -> Tamper:
    """Leave the gradients of the step before in those of step `at`."""
    kept: dict[str, np.ndarray] = {}

    def tamper(step: int, grads: dict[str, np.ndarray]) -> None:
        if step == at:
            for name in grads:
                if names in name:
                    grads[name] = grads[name] + kept[name]
        kept.update({name: values.copy() for name, values in grads.items()})

    return tamper


def edited(phase: Phase, change: Callable[[Record], Record | None], *, step: int | None = None, name: str = "") -> Edit:
    """Change the records of one phase, at one step or at all."""

    def edit(row: Row) -> Row | None:
        if row.phase is not phase or step not in (None, row.step):
            return row
        kept = (change(one) if name in one.name else one for one in row.records)
        return replace(row, records=tuple(one for one in kept if one is not None))

    return edit


def recorded(**settings: float) -> Edit:
    """Record other settings than those that the optimizer used: `recorded(beta1=0.9)`."""

    def change(one: Record) -> Record:
        key = one.name.rpartition(".")[2]
        return record(one.name, np.float64(settings[key])) if key in settings else one

    return edited(Phase.HPARAMS, change)


def with_data(one: Record, data: Any) -> Record:
    values = np.asarray(data, F32)
    return replace(one, data=values, shape=values.shape, alias_of="", stored=True)
