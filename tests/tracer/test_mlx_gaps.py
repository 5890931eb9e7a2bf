"""MLX runs that train something else than their author thinks: what the recorder sees of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tracer.mlx_runs import execute
from tracer.reader import Trace, open_trace
from tracer.schema import Phase

pytest.importorskip("mlx.core", reason="needs the extra `mlx`")

PROGRAM = """
import json, sys
from functools import partial
import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
import tracer
from mlx_common import digest

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.dropout, self.down = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)

    def __call__(self, x):
        return self.down(self.dropout(self.up(x)))

def loss_fn(model, x):
    return model(x).square().mean()

def run(before=lambda model: None, after=lambda model, x: None, held=lambda gradients: gradients, compiled=False):
    mx.random.seed(0)
    model, optimizer = Model(), optim.SGD(0.1)
    before(model)
    value_and_grad = nn.value_and_grad(model, loss_fn)
    state = [model.state, optimizer.state, mx.random.state]

    traced, modes = [], []

    def step(x):
        # Not called where a compiled function is called that was traced before.
        traced.append(model.training)
        loss, gradients = value_and_grad(model, x)
        optimizer.update(model, held(gradients))
        return loss

    step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    for _ in range(3):
        x = mx.random.normal((3, 4))
        loss = step(x)
        mx.eval(loss, state)
        modes.append(traced[-1])
        after(model, x)
    return digest(model.parameters()), modes

def evaluate(model, x):
    model.eval()
    mx.eval(model(x))
    model.train()

LOOPS = {
    "plain": {},
    "evaluated_in_between": {"after": evaluate},
    "left_in_evaluation": {"after": lambda model, x: model.eval()},
    "compiled_before": {"after": lambda model, x: model.eval(), "compiled": True},
    "always_in_evaluation": {"before": lambda model: model.eval()},
    "partly_in_evaluation": {"before": lambda model: model.dropout.eval()},
    "half_held": {"held": lambda gradients: {"up": gradients["up"]}},
}
said = {}
for name, loop in LOOPS.items():
    plain = run(**loop)
    with tracer.record(f"{sys.argv[1]}/{name}.h5") as recorder:
        recorded = run(**loop)
    said[name] = [plain[0] == recorded[0], recorder.failure, recorded[1]]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gaps")
    return folder, json.loads(execute("-c", PROGRAM, folder).stdout.splitlines()[-1])


def modes(trace: Trace) -> list[float | None]:
    """`reported.model.training` of each step; None where there is none."""
    found: list[float | None] = []
    for step in trace.steps[1:]:
        row = trace.row(Phase.HPARAMS, step)
        assert row is not None
        i = row.layout.positions.get("reported.model.training")
        found.append(None if i is None else float(row.read(i)))
    return found


def test_no_bit_of_a_run_changes(runs: tuple[Path, dict[str, Any]]) -> None:
    assert {name: found for name, found in runs[1].items() if found[:2] != [True, ""]} == {}


@pytest.mark.parametrize(
    ("name", "mode", "of_steps"),
    [
        ("plain", True, [None, None, None]),
        ("evaluated_in_between", True, [None, None, None]),
        ("left_in_evaluation", True, [None, 0.0, 0.0]),
        ("always_in_evaluation", False, [None, None, None]),
        ("partly_in_evaluation", "mixed", [None, None, None]),
    ],
)
def test_the_mode_of_what_is_differentiated_is_observed(
    runs: tuple[Path, dict[str, Any]], name: str, mode: bool | str, of_steps: list[float | None]
) -> None:
    with open_trace(runs[0] / f"{name}.h5") as trace:
        assert trace.observed["model.training"] == mode
        assert modes(trace) == of_steps


def test_a_compiled_step_has_the_mode_in_which_it_was_traced(runs: tuple[Path, dict[str, Any]]) -> None:
    # MLX compiles on some devices; on the others a function is traced at every call.
    traced = runs[1]["compiled_before"][2]
    with open_trace(runs[0] / "compiled_before.h5") as trace:
        assert trace.observed["model.training"] is traced[0] is True
        assert modes(trace) == [None if mode else 0.0 for mode in traced]


def test_trainable_parameters_that_get_no_update_are_counted_and_named(runs: tuple[Path, dict[str, Any]]) -> None:
    with open_trace(runs[0] / "half_held.h5") as half, open_trace(runs[0] / "plain.h5") as whole:
        assert (half.observed["optimizer.unheld"], whole.observed["optimizer.unheld"]) == (2, 0)
        assert half.observed["optimizer.unheld.names"] == ["down.bias", "down.weight"]
        assert whole.observed["autocast"] == "none"
