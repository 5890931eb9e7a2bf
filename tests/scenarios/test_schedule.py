"""Learning-rate schedules: ours against those of transformers, and in a graph of MLX against ours."""

from __future__ import annotations

import pytest

from scenarios.schedule import Schedule

SHAPES = [(kind, warmup) for kind in ("constant", "linear", "cosine") for warmup in (0, 3)]


@pytest.mark.parametrize(("kind", "warmup"), SHAPES)
def test_the_factor_is_that_of_transformers(kind: str, warmup: int) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra `torch`")
    optimization = pytest.importorskip("transformers.optimization", reason="needs the extra `torch`")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" and warmup else kind
    theirs = optimization.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for done in range(10):
        assert Schedule(kind, warmup, 10).factor(done) == theirs.get_last_lr()[0]
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("kind", "warmup"), SHAPES)
def test_in_a_graph_it_is_the_same_in_single_precision(kind: str, warmup: int) -> None:
    mx = pytest.importorskip("mlx.core", reason="needs the extra `mlx`")
    schedule = Schedule(kind, warmup, 10)
    rate = schedule.in_graph(1e-3, mx)
    for done in range(12):
        assert rate(mx.array(done, mx.uint64)).item() == pytest.approx(
            1e-3 * schedule.factor(done), rel=3e-6, abs=1e-10
        )
