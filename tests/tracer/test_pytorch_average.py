"""A program that divides its accumulated gradients by the number of micro-batches: that is accumulation, not clipping."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tracer.reader import open_trace
from tracer.schema import Phase

pytest.importorskip("torch", reason="needs the extra `torch`")

PROGRAM = """
import sys, torch, tracer
torch.manual_seed(0)
with tracer.record(sys.argv[1]):
    model = torch.nn.Linear(4, 3).to(getattr(torch, sys.argv[3]))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        for _ in range(3):
            model(torch.randn(5, 4, dtype=model.weight.dtype)).pow(2).mean().backward()
        for p in model.parameters():
            exec(sys.argv[2])
        optimizer.step()
        optimizer.zero_grad()
"""


def clipped(tmp_path: Path, change: str, dtype: str = "float32") -> bool:
    """Whether what the optimizer got is another record than the accumulated gradient."""
    path = tmp_path / "a.h5"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(path), change, dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open_trace(path) as trace:
        row = trace.row(Phase.CLIPPED_GRAD, 2)
        assert row is not None
        return not all(entry.alias_of for entry in row.layout.entries)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_division_by_the_micro_batches_is_part_of_the_gradient(tmp_path: Path, dtype: str) -> None:
    assert not clipped(tmp_path, "p.grad.div_(3)", dtype)


def test_so_is_a_product_with_the_reciprocal(tmp_path: Path) -> None:
    assert not clipped(tmp_path, "p.grad.mul_(1 / 3)")


@pytest.mark.parametrize("change", ["p.grad.div_(2)", "p.grad.clamp_(-1e-3, 1e-3)", "p.grad.div_(3).add_(1e-4)"])
def test_another_change_is_not(tmp_path: Path, change: str) -> None:
    assert clipped(tmp_path, change)
