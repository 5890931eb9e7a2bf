"""Collect what a replay needs from one trace: settings, gradient, state and parameters of one name at one step.

Returns None where the trace does not hold it (narrowed with --what or --steps), never a guess: only an optimizer's state
before its first step is known without being recorded, and is zero.
"""

from __future__ import annotations

from typing import Final

from differ.align import Row, Rows, Tensor
from differ.inputs import parameters_before
from differ.replay.optimizer import FIRST_MOMENT, MOMENTUM, SECOND_MOMENT, Hyper, MomentInputs, UpdateInputs
from tracer.names import split_state_name, state_name
from tracer.schema import Phase

# Settings that a framework may hold as float32: 0.99900001287 is 0.999.
SIGNIFICANT_DIGITS: Final = 7


def update_inputs(rows: Rows, row: Row, name: str) -> UpdateInputs | None:
    """Inputs of a parameter's update; `row` is the param row, `name` the parameter."""
    step = row.view.step
    hyper = hyper_of(rows, step, name)
    before = _read(parameters_before(rows, step), name, row.shape(name))
    if hyper is None or before is None:
        return None
    state = rows.get(Phase.OPT_STATE, step)
    first = _read(state, state_name(name, FIRST_MOMENT), row.shape(name))
    second = _read(state, state_name(name, SECOND_MOMENT), row.shape(name))
    if first is not None and second is not None:
        return UpdateInputs(before, row.read(name), None, first, second, hyper)
    gradient = _read(_gradients(rows, step), name, row.shape(name))
    if hyper.beta1 or hyper.beta2 or first is not None or second is not None or gradient is None:
        return None
    buffer = next(
        (_read(state, state_name(name, kind), row.shape(name)) for kind in MOMENTUM if _has(state, name, kind)), None
    )
    if buffer is None and hyper.momentum:
        return None
    return UpdateInputs(before, row.read(name), gradient, buffer, None, hyper)


def moment_inputs(rows: Rows, row: Row, name: str) -> MomentInputs | None:
    """Inputs of a moment; `row` is the opt_state row, `name` that of the state record."""
    step = row.view.step
    parameter, kind = split_state_name(name)
    hyper = hyper_of(rows, step, parameter)
    gradient = _read(_gradients(rows, step), parameter, row.shape(name))
    if kind not in (FIRST_MOMENT, SECOND_MOMENT, *MOMENTUM) or hyper is None or gradient is None:
        return None
    before = _state_before(rows, step, name, row)
    if before is None:
        return None
    weights = _read(parameters_before(rows, step), parameter, row.shape(name))
    return MomentInputs(kind, before, row.read(name), gradient, weights, hyper)


def _state_before(rows: Rows, step: int, name: str, row: Row) -> Tensor | None:
    earlier = rows.get(Phase.OPT_STATE, step - 1)
    if earlier is None and step == 1:
        return Tensor.zeros(row.shape(name))
    return _read(earlier, name, row.shape(name))


def _gradients(rows: Rows, step: int) -> Row | None:
    return rows.get(Phase.CLIPPED_GRAD, step) or rows.get(Phase.GRAD, step)


def _has(row: Row | None, name: str, kind: str) -> bool:
    return row is not None and state_name(name, kind) in row.positions


def _read(row: Row | None, name: str, shape: tuple[int, ...]) -> Tensor | None:
    if row is None or name not in row.positions or not row.stored(name) or row.shape(name) != shape:
        return None
    return row.read(name)


def hyper_of(rows: Rows, step: int, parameter: str) -> Hyper | None:
    """Settings of a parameter's group at a step; None if there are none, or no lr among them."""
    row = rows.get(Phase.HPARAMS, step)
    if row is None:
        return None
    group = _group_of(rows, row, parameter)
    settings = rows.remember(("settings", step, group), lambda: _settings(row, group))
    if "lr" not in settings:
        return None
    return Hyper(step=_updates(rows, step, parameter), **settings)


_SETTINGS: Final = ("lr", "beta1", "beta2", "eps", "weight_decay", "momentum", "dampening")


def _settings(row: Row, group: str) -> dict[str, float]:
    """The numbers of one group that a replay uses, those that are recorded."""
    found = {key: row.scalar(f"{group}.{key}") for key in _SETTINGS}
    return {key: float(f"{value:.{SIGNIFICANT_DIGITS}g}") for key, value in found.items() if value is not None}


def _group_of(rows: Rows, row: Row, parameter: str) -> str:
    """Name of the group that holds a parameter; with one group there is no list of members."""
    groups = rows.trace.observed.get("optimizer.groups")
    if isinstance(groups, dict):
        for group, members in groups.items():
            if isinstance(members, list) and parameter in members:
                return str(group)
    return "group0" if "group0.lr" in row.positions else next(iter(row.positions), "group0").partition(".")[0]


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
