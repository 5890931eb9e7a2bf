"""Collect what a replay needs from one trace: settings, gradient, state and parameters of one name at one step.

Gives None where the trace does not hold it (narrowed with --what or --steps), never a guess: only an optimizer's state
before its first step is known without being recorded.  Tensors are read when a rule asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Final

import numpy as np

from differ.align import Row, Rows, Tensor
from differ.inputs import parameters_before
from differ.replay.optimizer import MomentInputs, UpdateInputs
from differ.replay.rules import initial, moment_rules, update_rules
from differ.replay.rules.base import Hyper, Rule
from tracer.dtypes import DTYPES
from tracer.names import split_state_name, state_name
from tracer.schema import Phase

# Settings that a framework may hold as float32: 0.99900001287 is 0.999.
SIGNIFICANT_DIGITS: Final = 7
# Derived values that are kept of one tensor.
_KEPT: Final = 8

_SETTINGS: Final = ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "dampening")


class Around:
    """What one trace holds around the update of one step: its rows, looked up once for all parameters."""

    def __init__(self, rows: Rows, step: int) -> None:
        self.step = step
        self.state, self.earlier = rows.get(Phase.OPT_STATE, step), rows.get(Phase.OPT_STATE, step - 1)
        self.gradients = rows.get(Phase.CLIPPED_GRAD, step) or rows.get(Phase.GRAD, step)
        self.parameters = parameters_before(rows, step)
        self._settings = rows.get(Phase.HPARAMS, step)
        self._members = members(rows)
        self._groups: dict[str, dict[str, float]] = {}
        self._counted: dict[str, float | None] = {}
        self._hypers: dict[tuple[str, int], Hyper] = {}
        self._of: dict[str, Hyper | None] = {}
        self._rules: dict[tuple[object, ...], tuple[Rule, ...]] = {}

    def hyper(self, parameter: str) -> Hyper | None:
        """Settings of a parameter's group; None if none were recorded.  One object for all that share them."""
        if parameter not in self._of:
            self._of[parameter] = self._hyper(parameter)
        return self._of[parameter]

    def kinds(self, parameter: str) -> frozenset[str]:
        """Kinds of float state that are recorded of a parameter after the update."""
        return frozenset() if self.state is None else self.state.float_state.get(parameter, frozenset())

    def rules(self, hyper: Hyper, kinds: frozenset[str], kind: str = "") -> tuple[Rule, ...]:
        """Rules that state of these kinds leaves possible, for the update or for one kind of state."""
        key = (id(hyper), kinds, kind)  # `_hypers` holds the settings, so that no others have their identity
        if key not in self._rules:
            self._rules[key] = moment_rules(kinds, hyper, kind) if kind else update_rules(kinds, hyper)
        return self._rules[key]

    def _hyper(self, parameter: str) -> Hyper | None:
        row = self._settings
        if row is None:
            return None
        group = self._members.get(parameter) or self._only_group
        if group not in self._groups:
            self._groups[group] = _settings(row, group)
        settings = self._groups[group]
        if not settings:
            return None
        key = (group, self._updates(parameter))
        if key not in self._hypers:
            self._hypers[key] = _hyper(settings, key[1])
        return self._hypers[key]

    @cached_property
    def _only_group(self) -> str:
        """With one group there is no list of members."""
        names: Iterable[str] = () if self._settings is None else self._settings.positions
        return next((name for name in names if name.startswith("group")), "group0").partition(".")[0]

    def _updates(self, parameter: str) -> int:
        """How many updates the optimizer has made, this one included: its own counter, else the step's number."""
        if self.state is not None:
            for name in (f"{parameter}/step", "step"):
                if name not in self._counted:
                    self._counted[name] = self.state.scalar(name)
                counted = self._counted[name]
                if counted is not None and counted >= 1.0:
                    return int(counted)
        return max(1, self.step)


def around(rows: Rows, step: int) -> Around:
    """What a trace holds around a step's update."""
    found: Around = rows.lately(("around", step), lambda: Around(rows, step))
    return found


class Held:
    """What one trace holds of one parameter around the update of one step."""

    def __init__(self, around: Around, parameter: str, hyper: Hyper, kinds: frozenset[str]) -> None:
        self._around, self._name, self._hyper = around, parameter, hyper
        self.kinds = kinds
        self._state: dict[str, Tensor | None] = {}
        self._earlier: dict[str, Tensor | None] = {}
        self._derived: dict[object, Any] = {}

    @cached_property
    def gradient(self) -> Tensor | None:
        """The clipped gradient."""
        return _read(self._around.gradients, self._name)

    @cached_property
    def parameter(self) -> Tensor | None:
        """The parameter before this update."""
        return _read(self._around.parameters, self._name)

    def state(self, kind: str) -> Tensor | None:
        """State after this update."""
        if kind not in self._state:
            self._state[kind] = _read(self._around.state, state_name(self._name, kind))
        return self._state[kind]

    def earlier(self, kind: str) -> Tensor | None:
        """State before this update; before the first one what an optimizer starts from."""
        if kind not in self._earlier:
            self._earlier[kind] = self._before(kind)
        return self._earlier[kind]

    def _before(self, kind: str) -> Tensor | None:
        name = state_name(self._name, kind)
        if self._around.step == 1 and self._around.earlier is None:
            now = self._around.state
            return None if now is None or name not in now.positions else start_of(now, name, kind, self._hyper)
        return _read(self._around.earlier, name)

    def remember(self, key: object, compute: Callable[[], Any]) -> Any:
        """A derived value, computed once; only the last few are kept."""
        if key not in self._derived:
            while len(self._derived) >= _KEPT:
                del self._derived[next(iter(self._derived))]
            self._derived[key] = compute()
        return self._derived[key]


def update_inputs(rows: Rows, row: Row, name: str) -> UpdateInputs | None:
    """Inputs of a parameter's update; `row` is the param row, `name` the parameter."""
    at = around(rows, row.view.step)
    hyper = at.hyper(name)
    before = _read(at.parameters, name)
    if hyper is None or before is None or before.shape != row.shape(name):
        return None
    held = Held(at, name, hyper, at.kinds(name))
    rules = at.rules(hyper, held.kinds)
    # Adam's update is told by its state alone; nothing else is.
    if not rules or ("exp_avg_sq" not in held.kinds and held.gradient is None):
        return None
    return UpdateInputs(before, row.read(name), hyper, held, rules)


def moment_inputs(rows: Rows, row: Row, name: str) -> MomentInputs | None:
    """Inputs of a moment; `row` is the opt_state row, `name` that of the state record."""
    at = around(rows, row.view.step)
    parameter, kind = split_state_name(name)
    hyper = at.hyper(parameter)
    if hyper is None:
        return None
    held = Held(at, parameter, hyper, at.kinds(parameter))
    rules = at.rules(hyper, held.kinds, kind)
    if not rules or held.gradient is None:
        return None
    before = _state_before(at, name, row, kind, hyper)
    return None if before is None else MomentInputs(before, row.read(name), hyper, held, rules, kind)


def _state_before(at: Around, name: str, row: Row, kind: str, hyper: Hyper) -> Tensor | None:
    if at.earlier is None and at.step == 1:
        return start_of(row, name, kind, hyper)
    before = _read(at.earlier, name)
    return None if before is None or before.shape != row.shape(name) else before


def start_of(row: Row, name: str, kind: str, hyper: Hyper) -> Tensor:
    """State of a record before the first update: zeros, or the number that its kind starts from."""
    value = initial(kind, hyper)
    shape = row.shape(name)
    return Tensor.zeros(shape) if value == 0.0 else Tensor(np.full(shape, value, DTYPES["float64"]), "float64")


def _read(row: Row | None, name: str) -> Tensor | None:
    return None if row is None or name not in row.positions or not row.stored(name) else row.read(name)


def hyper_of(rows: Rows, step: int, parameter: str) -> Hyper | None:
    """Settings of a parameter's group at a step; None if none were recorded."""
    return around(rows, step).hyper(parameter)


def _hyper(settings: dict[str, float], updates: int) -> Hyper:
    named = {"lr": float("nan")} | {key: value for key, value in settings.items() if key in _SETTINGS}
    return Hyper(step=updates, more={k: v for k, v in settings.items() if k not in _SETTINGS}, **named)


def _settings(row: Row, group: str) -> dict[str, float]:
    """The numbers of one group that are recorded."""
    names = {name.removeprefix(f"{group}."): name for name in row.positions if name.startswith(f"{group}.")}
    found = {key: row.scalar(name) for key, name in names.items()}
    return {key: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for key, value in found.items() if value is not None}


def members(rows: Rows) -> dict[str, str]:
    """Parameter -> group, as a trace with several groups says; empty if it does not."""
    known: dict[str, str] = rows.remember(("members",), lambda: _members(rows))
    return known


def _members(rows: Rows) -> dict[str, str]:
    groups = rows.trace.observed.get("optimizer.groups")
    if not isinstance(groups, dict):
        return {}
    return {str(name): str(group) for group, names in groups.items() if isinstance(names, list) for name in names}
