"""Collect what a replay needs from one trace: settings, gradient, state and parameters of one name at one step.

Gives None where the trace does not hold it (narrowed with --what or --steps), never a guess: only an optimizer's state
before its first step is known without being recorded.  Tensors are read when a rule asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

import numpy as np

from differ.align import Row, Rows, Tensor
from differ.inputs import parameters_before
from differ.replay.optimizer import MomentInputs, UpdateInputs
from differ.replay.rules import initial, moment_rules, update_rules
from differ.replay.rules.base import Hyper
from tracer.dtypes import DTYPES
from tracer.names import split_state_name, state_name
from tracer.schema import Phase

# Settings that a framework may hold as float32: 0.99900001287 is 0.999.
SIGNIFICANT_DIGITS: Final = 7
# Derived values that are kept of one tensor.
_KEPT: Final = 8

_SETTINGS: Final = ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "dampening")


class Held:
    """What one trace holds of one parameter around the update of one step."""

    def __init__(self, rows: Rows, step: int, parameter: str, hyper: Hyper, kinds: frozenset[str]) -> None:
        self._rows, self._step, self._name, self._hyper = rows, step, parameter, hyper
        self.kinds = kinds
        self._state: dict[tuple[str, int], Tensor | None] = {}
        self._derived: dict[object, Any] = {}

    @cached_property
    def gradient(self) -> Tensor | None:
        """The clipped gradient."""
        rows, step = self._rows, self._step
        return _read(rows, rows.get(Phase.CLIPPED_GRAD, step) or rows.get(Phase.GRAD, step), self._name)

    @cached_property
    def parameter(self) -> Tensor | None:
        """The parameter before this update."""
        return _read(self._rows, parameters_before(self._rows, self._step), self._name)

    def state(self, kind: str) -> Tensor | None:
        """State after this update."""
        return self._at(kind, self._step)

    def earlier(self, kind: str) -> Tensor | None:
        """State before this update; before the first one what an optimizer starts from."""
        if self._step == 1 and self._rows.get(Phase.OPT_STATE, 0) is None:
            now = self._rows.get(Phase.OPT_STATE, 1)
            name = state_name(self._name, kind)
            return None if now is None or name not in now.positions else start_of(now, name, kind, self._hyper)
        return self._at(kind, self._step - 1)

    def remember(self, key: object, compute: Callable[[], Any]) -> Any:
        """A derived value, computed once; only the last few are kept."""
        if key not in self._derived:
            while len(self._derived) >= _KEPT:
                del self._derived[next(iter(self._derived))]
            self._derived[key] = compute()
        return self._derived[key]

    def _at(self, kind: str, step: int) -> Tensor | None:
        if (kind, step) not in self._state:
            self._state[kind, step] = _read(
                self._rows, self._rows.get(Phase.OPT_STATE, step), state_name(self._name, kind)
            )
        return self._state[kind, step]


def update_inputs(rows: Rows, row: Row, name: str) -> UpdateInputs | None:
    """Inputs of a parameter's update; `row` is the param row, `name` the parameter."""
    step = row.view.step
    hyper = hyper_of(rows, step, name)
    before = _read(rows, parameters_before(rows, step), name)
    if hyper is None or before is None or before.shape != row.shape(name):
        return None
    held = Held(rows, step, name, hyper, kinds_of(rows, step, name))
    # What is remembered holds the settings, so that no others have their identity as long as it is.
    _, rules = rows.remember(("rules", id(hyper), held.kinds), lambda: (hyper, update_rules(held.kinds, hyper)))
    # Adam's update is told by its state alone; nothing else is.
    if not rules or ("exp_avg_sq" not in held.kinds and held.gradient is None):
        return None
    return UpdateInputs(before, rows.tensor(row, name), hyper, held, rules)


def moment_inputs(rows: Rows, row: Row, name: str) -> MomentInputs | None:
    """Inputs of a moment; `row` is the opt_state row, `name` that of the state record."""
    step = row.view.step
    parameter, kind = split_state_name(name)
    hyper = hyper_of(rows, step, parameter)
    if hyper is None:
        return None
    held = Held(rows, step, parameter, hyper, kinds_of(rows, step, parameter))
    key = ("rules", id(hyper), held.kinds, kind)
    _, rules = rows.remember(key, lambda: (hyper, moment_rules(held.kinds, hyper, kind)))
    if not rules or held.gradient is None:
        return None
    before = _state_before(rows, step, name, row, kind, hyper)
    return None if before is None else MomentInputs(before, rows.tensor(row, name), hyper, held, rules, kind)


def kinds_of(rows: Rows, step: int, parameter: str) -> frozenset[str]:
    """Kinds of float state that a trace holds of a parameter after a step."""
    row = rows.get(Phase.OPT_STATE, step)
    return frozenset() if row is None else row.float_state.get(parameter, frozenset())


def _state_before(rows: Rows, step: int, name: str, row: Row, kind: str, hyper: Hyper) -> Tensor | None:
    earlier = rows.get(Phase.OPT_STATE, step - 1)
    if earlier is None and step == 1:
        return start_of(row, name, kind, hyper)
    before = _read(rows, earlier, name)
    return None if before is None or before.shape != row.shape(name) else before


def start_of(row: Row, name: str, kind: str, hyper: Hyper) -> Tensor:
    """State of a record before the first update: zeros, or the number that its kind starts from."""
    value = initial(kind, hyper)
    shape = row.shape(name)
    return Tensor.zeros(shape) if value == 0.0 else Tensor(np.full(shape, value, DTYPES["float64"]), "float64")


def _read(rows: Rows, row: Row | None, name: str) -> Tensor | None:
    return None if row is None or name not in row.positions or not row.stored(name) else rows.tensor(row, name)


def hyper_of(rows: Rows, step: int, parameter: str) -> Hyper | None:
    """Settings of a parameter's group at a step; None if none were recorded."""
    row = rows.get(Phase.HPARAMS, step)
    if row is None:
        return None
    group = _group_of(rows, row, parameter)
    settings: dict[str, float] = rows.remember(("settings", step, group), lambda: _settings(row, group))
    if not settings:
        return None
    updates = _updates(rows, step, parameter)
    hyper: Hyper = rows.remember(("hyper", step, group, updates), lambda: _hyper(settings, updates))
    return hyper


def _hyper(settings: dict[str, float], updates: int) -> Hyper:
    named = {"lr": float("nan")} | {key: value for key, value in settings.items() if key in _SETTINGS}
    return Hyper(step=updates, more={k: v for k, v in settings.items() if k not in _SETTINGS}, **named)


def _settings(row: Row, group: str) -> dict[str, float]:
    """The numbers of one group that are recorded."""
    names = {name.removeprefix(f"{group}."): name for name in row.positions if name.startswith(f"{group}.")}
    found = {key: row.scalar(name) for key, name in names.items()}
    return {key: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for key, value in found.items() if value is not None}


def _group_of(rows: Rows, row: Row, parameter: str) -> str:
    """Name of the group that holds a parameter; with one group there is no list of members."""
    group = members(rows).get(parameter)
    if group is not None:
        return group
    return next((name for name in row.positions if name.startswith("group")), "group0").partition(".")[0]


def members(rows: Rows) -> dict[str, str]:
    """Parameter -> group, as a trace with several groups says; empty if it does not."""
    known: dict[str, str] = rows.remember(("members",), lambda: _members(rows))
    return known


def _members(rows: Rows) -> dict[str, str]:
    groups = rows.trace.observed.get("optimizer.groups")
    if not isinstance(groups, dict):
        return {}
    return {str(name): str(group) for group, names in groups.items() if isinstance(names, list) for name in names}


def _updates(rows: Rows, step: int, parameter: str) -> int:
    """How many updates the optimizer has made, this one included: its own counter, else the step's number."""
    state = rows.get(Phase.OPT_STATE, step)
    if state is None:
        return max(1, step)
    for name in (state_name(parameter, "step"), "step"):
        counted: float | None = rows.remember((name, step), lambda name=name: state.scalar(name))  # type: ignore[misc]
        if counted is not None and counted >= 1.0:
            return int(counted)
    return max(1, step)
