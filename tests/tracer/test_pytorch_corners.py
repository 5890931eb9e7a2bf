"""Loops that clip in their own way, models whose modules cannot be hooked, tensors that are spread over processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tracer.reader import open_trace
from tracer.schema import REPORTED_PREFIX, Phase, State

pytest.importorskip("torch", reason="needs the extra `torch`")

PROGRAM = """
import json, sys, torch, tracer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from tracer.backends import pytorch_step
from tracer.schema import Phase

taken = 0

def counted(name, size):
    original = getattr(pytorch_step, name)

    def counting(tensors, **kwargs):
        global taken
        taken += size(tensors)
        return original(tensors, **kwargs)

    setattr(pytorch_step, name, counting)

for name, size in (("take", lambda _: 1), ("take_all", len), ("copy_together", len)):
    counted(name, size)

def train(name, clip, model=None, batch=None, micro_batches=1, steps=1, **options):
    torch.manual_seed(0)
    model = model or torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(20)))
    optimizer = torch.optim.AdamW(model.parameters())
    with tracer.record(f"{sys.argv[1]}/{name}.h5", **options) as recorder:
        for _ in range(steps):
            for _ in range(micro_batches):
                model(torch.randn(5, 4) if batch is None else batch).pow(2).mean().backward()
            clip(list(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
    return model, recorder.failure

def each(parameters):
    for parameter in parameters:
        clip_grad_norm_([parameter], 0.01)

def bare(parameters):
    for parameter in parameters:
        clip_grad_norm_(parameter, 0.01)

def values(parameters):
    for parameter in parameters:
        clip_grad_value_(parameter, 0.01)

def measured(parameters):
    clip_grad_norm_(parameters, float("inf"))
    each(parameters)

def groups(parameters):
    clip_grad_norm_(parameters[:20], 0.01)
    clip_grad_norm_(parameters[20:], 0.02)

def halved(parameters):
    clip_grad_norm_(parameters, 1e3)
    for parameter in parameters:
        parameter.grad.div_(2)

for clip in (each, bare, values, measured, groups):
    train(clip.__name__, clip)
train("whole", lambda parameters: clip_grad_norm_(iter(parameters), 0.01))
train("halved", halved, micro_batches=2)
said = {}
for count in (1, 3):
    taken = 0
    train(f"accumulated{count}", each, micro_batches=count)
    said[f"taken{count}"] = taken

class Tokens(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.embed_tokens, self.inner = torch.nn.Embedding(8, 4), inner

    def forward(self, input_ids):
        return self.inner(self.embed_tokens(input_ids))

class Closed(torch.nn.Linear):
    def register_forward_hook(self, *args, **kwargs):
        raise RuntimeError("no hooks here")

ids = torch.arange(6).reshape(2, 3)

def evaluating(folder, held):
    # Forwards with gradients enabled that no backward follows, as of a program that evaluates without `no_grad`.
    pytorch_step.WAITING_BYTES = held
    torch.manual_seed(0)
    model = Tokens(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tracer.record(folder, what=frozenset(Phase)) as recorder:
        for i in range(10):
            loss = model((ids + i) % 8).pow(2).mean()
        loss.backward()
        optimizer.step()
    return recorder.failure

said["held"] = evaluating(f"{sys.argv[1]}/held.h5", 2**20) + evaluating(f"{sys.argv[1]}/let_go.h5", 600)
inside = {"what": frozenset(Phase), "micro_grads": True}
model, said["failure"] = train("closed", bare, Tokens(Closed(4, 4)), ids, steps=2, **inside)
said["hooks"] = sum(len(module._forward_hooks) for module in model.modules())

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
sharded = Tokens(torch.nn.Linear(4, 4))
fully_shard(sharded, mesh=mesh)
said["sharded"] = train("sharded", lambda parameters: None, sharded, ids, micro_batches=2, **inside)[1]

class Spread(torch.nn.Module):
    def forward(self, hidden):
        return DTensor.from_local(hidden, mesh, [Replicate()])

class Gathered(torch.nn.Module):
    def forward(self, hidden):
        return hidden.to_local()

stack = torch.nn.Sequential(torch.nn.Linear(4, 4), Spread(), Gathered())
said["spread"] = train("spread", lambda parameters: None, Tokens(stack), ids, **inside)[1]
torch.distributed.destroy_process_group()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("corners")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1])


def clip_of(path: Path) -> tuple[str, float, list[str]]:
    """How a run clips, at which bound, and the norms that it reported."""
    with open_trace(path) as trace:
        row = trace.row(Phase.GRAD, 1)
        assert row is not None
        norms = [entry.name for entry in row.layout.entries if entry.name.startswith(REPORTED_PREFIX)]
        return trace.observed["clip.mode"], trace.observed["clip.value"], norms


@pytest.mark.parametrize(
    ("name", "mode", "norms"),
    [
        ("each", "tensor", []),
        ("bare", "tensor", []),
        ("measured", "tensor", ["reported.grad_norm"]),
        ("values", "value", []),
        ("groups", "norm", ["reported.grad_norm.0", "reported.grad_norm.1"]),
        ("whole", "norm", ["reported.grad_norm"]),
    ],
)
def test_clipping_each_tensor_by_itself_is_a_mode_of_its_own_without_norms(
    runs: tuple[Path, dict[str, Any]], name: str, mode: str, norms: list[str]
) -> None:
    assert clip_of(runs[0] / f"{name}.h5") == (mode, 0.01, norms)


def test_a_clip_of_each_tensor_does_not_look_at_all_gradients_again(runs: tuple[Path, dict[str, Any]]) -> None:
    # Two snapshots of 40 gradients more, one look at them before the first clip, and some losses.
    assert runs[1]["taken3"] < runs[1]["taken1"] + 4 * 40


def test_a_division_after_a_clip_is_no_accumulation(runs: tuple[Path, dict[str, Any]]) -> None:
    with open_trace(runs[0] / "halved.h5") as trace:
        grad, given = trace.row(Phase.GRAD, 1), trace.row(Phase.CLIPPED_GRAD, 1)
        assert grad is not None
        assert given is not None
        assert not given.layout.entries[0].alias_of
        np.testing.assert_array_equal(given.read(0), grad.read(0) / 2)


@pytest.mark.parametrize(("name", "kept"), [("held", 10), ("let_go", 4)])
def test_forwards_without_a_backward_are_let_go_before_they_fill_the_memory(
    runs: tuple[Path, dict[str, Any]], name: str, kept: int
) -> None:
    assert runs[1]["held"] == ""
    with open_trace(runs[0] / f"{name}.h5") as trace:
        assert trace.micro_batches(Phase.BATCH, 1) == tuple(range(10))
        for i in range(10):
            row = trace.row(Phase.BATCH, 1, i)
            assert row is not None
            there = i >= 10 - kept
            assert row.state(row.layout.positions["input_ids"]) is (State.VALUE if there else State.UNRECORDED)
            assert (trace.row(Phase.FORWARD, 1, i) is not None) is there
            if there:
                ids = row.read(row.layout.positions["input_ids"])
                np.testing.assert_array_equal(ids, (np.arange(6).reshape(2, 3) + i) % 8)


def test_a_module_that_cannot_be_hooked_stops_the_recording_and_leaves_no_hook(
    runs: tuple[Path, dict[str, Any]],
) -> None:
    assert "no hooks here" in runs[1]["failure"]
    assert runs[1]["hooks"] == 0


def test_the_micro_gradients_of_shards_are_unrecorded_and_not_absent(runs: tuple[Path, dict[str, Any]]) -> None:
    assert runs[1]["sharded"] == ""
    with open_trace(runs[0] / "sharded.h5") as trace:
        for number in (0, 1):
            row = trace.row(Phase.GRAD, 1, number)
            assert row is not None
            assert {row.state(i) for i in range(row.layout.records)} == {State.UNRECORDED}


def test_an_output_that_is_spread_over_processes_is_unrecorded(runs: tuple[Path, dict[str, Any]]) -> None:
    assert runs[1]["spread"] == ""
    with open_trace(runs[0] / "spread.h5") as trace:
        row = trace.row(Phase.FORWARD, 1, 0)
        assert row is not None
        states = {entry.name: row.state(i) for i, entry in enumerate(row.layout.entries)}
    assert states["inner.1"] is State.UNRECORDED
    assert states["inner.2"] is State.VALUE
