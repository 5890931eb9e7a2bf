"""What an optimizer holds: the settings of its groups, and its state, as records.

Settings are float64 scalars under names that other frameworks use too; switches that only choose an implementation
(`foreach`, `fused`) and those that are off are left out, so that two frameworks line up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from tracer.backends.pytorch_copies import take_all
from tracer.backends.pytorch_tensors import Taken, record_of, scalar
from tracer.dtypes import to_numpy
from tracer.names import NameMap
from tracer.schema import Record

# Optimizers of torch that divide by 1 - beta^t, and have no setting that says so.
BIAS_CORRECTED: Final = frozenset({"Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam"})
# Settings of an implementation, or of a schedule: not of the update rule.
NOT_SETTINGS: Final = frozenset(
    {
        "params",
        "param_names",
        "foreach",
        "fused",
        "capturable",
        "differentiable",
        "initial_lr",
        "decoupled_weight_decay",
    }
)
BIAS_KEYS: Final = ("bias_correction", "correct_bias")


@dataclass(frozen=True, slots=True)
class Group:
    """Settings of a parameter group as one update used them, and the canonical names of its parameters."""

    settings: Mapping[str, float | bool]
    names: tuple[str, ...]


def groups_of(optimizer: Any, name_of: Callable[[Any], str]) -> list[Group]:
    """The groups of an optimizer that hold a trainable parameter; of one that holds none, all of them."""
    groups = [
        Group(_settings(optimizer, group), tuple(name_of(p) for p in group["params"] if p.requires_grad))
        for group in optimizer.param_groups
    ]
    return [group for group in groups if group.names] or groups


def merged(groups: Iterable[Group]) -> list[Group]:
    """Groups with equal settings made one, in the order in which each first appears."""
    by_settings: dict[tuple[tuple[str, float | bool], ...], list[str]] = {}
    for group in groups:
        by_settings.setdefault(tuple(sorted(group.settings.items())), []).extend(group.names)
    return [Group(dict(settings), tuple(names)) for settings, names in by_settings.items()]


def group_records(groups: Sequence[Group]) -> list[Record]:
    """`group0.lr` and so on; flags as bool, the rest as float64."""
    return [
        scalar(f"group{i}.{key}", value, "bool" if isinstance(value, bool) else "float64")
        for i, group in enumerate(groups)
        for key, value in sorted(group.settings.items())
    ]


def _settings(optimizer: Any, group: Mapping[str, Any]) -> dict[str, float | bool]:
    settings: dict[str, float | bool] = {}
    for key, value in group.items():
        if key == "betas":
            settings.update({f"beta{i + 1}": float(beta) for i, beta in enumerate(value)})
        elif key in BIAS_KEYS:
            settings["bias_correction"] = bool(value)
        elif key not in NOT_SETTINGS and not key.startswith("_"):
            settings.update(_setting(key, value))
    corrected = bias_correction(optimizer)
    if corrected is not None:
        settings.setdefault("bias_correction", corrected)
    return settings


def _setting(key: str, value: Any) -> dict[str, float | bool]:
    if isinstance(value, bool):
        # A switch that is off says what an optimizer without it says by having none.
        return {key: True} if value else {}
    if isinstance(value, tuple | list):
        return {f"{key}{i + 1}": float(v) for i, v in enumerate(value) if isinstance(v, int | float)}
    if isinstance(value, int | float):
        return {key: float(value)}
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        # A learning rate may be a tensor.
        return {key: float(value.item())}
    return {}


def bias_correction(optimizer: Any) -> bool | None:
    """Whether the optimizer corrects its moments for their bias at the start; None if that cannot be told."""
    for group in optimizer.param_groups:
        for key in BIAS_KEYS:
            if key in group:
                return bool(group[key])
    mro = inspect.getmro(type(optimizer))
    if any(cls.__name__ in BIAS_CORRECTED and cls.__module__.startswith("torch.optim") for cls in mro):
        return True
    return None


def take_state(
    parameters: Sequence[tuple[str, Any]], states: Sequence[Mapping[Any, Any]], names: NameMap
) -> tuple[list[list[Record]], dict[str, int]]:
    """State of each named parameter, and how many updates each has had by the optimizer's own count.

    `states`: those of the optimizer and of any that it drives.
    """
    held = [_state_of(parameter, states) for _, parameter in parameters]
    tensors = iter(take_all([value for state in held for value in state.values() if _is_tensor(value)]))
    records: list[list[Record]] = []
    counts: dict[str, int] = {}
    for (original, _), state in zip(parameters, held, strict=True):
        records.append([])
        for kind, value in state.items():
            taken = next(tensors) if _is_tensor(value) else _number(value)
            if taken is None:
                continue
            if kind == "step" and taken.data is not None and taken.data.size == 1:
                counts[original] = int(to_numpy(taken.data, taken.dtype).item())
            else:
                records[-1].append(record_of(names, original, taken, kind=kind))
    return records, counts


def state_records(held: Iterable[tuple[Sequence[tuple[str, Any]], Any]], names: NameMap) -> list[Record]:
    """State of several optimizers before the first update, which a resumed run has: of each, parameters by name and its state."""
    records: list[Record] = []
    counts: dict[str, int] = {}
    for parameters, state in held:
        found, own = take_state(parameters, [state], names)
        records += [record for of_one in found for record in of_one]
        counts |= own
    return records + step_records(counts, names)


def _state_of(parameter: Any, states: Sequence[Mapping[Any, Any]]) -> Mapping[str, Any]:
    for state in states:
        # Not by index: an optimizer's state is a defaultdict, and asking for an entry would make one.
        found: Any = state.get(parameter)
        if isinstance(found, Mapping):
            return found
    return {}


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "element_size")


def _number(value: Any) -> Taken | None:
    if isinstance(value, bool | int):
        return Taken(np.asarray(int(value), np.int64), "int64", ())
    if isinstance(value, float):
        return Taken(np.asarray(value, np.float64), "float64", ())
    # Lists and objects (L-BFGS keeps its history so) have no counterpart elsewhere.
    return None


def step_records(counts: Mapping[str, int], names: NameMap) -> list[Record]:
    """The counts as one record `step` if all parameters agree, else as one per parameter."""
    if not counts:
        return []
    if len(set(counts.values())) == 1:
        return [scalar("step", next(iter(counts.values())), "int64")]
    return [
        record_of(names, name, Taken(np.asarray(count, np.int64), "int64", ()), kind="step")
        for name, count in counts.items()
    ]
