"""Module outputs across frameworks and settings: the first module that computes something else is named, and why.

Each pair shares adapters and batches, and is recorded with all that is inside a step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from differ import DiffResult, Verdict, diff
from scenarios.models import Tiny, model_config, tiny_folder, weights
from tests.scenarios.conftest import Once, arm, needs_mlx, needs_torch, paths_of, record_all
from tracer.reader import open_trace
from tracer.schema import Phase

pytestmark = [needs_torch, needs_mlx]

MODELS = ("tiny-llama", "tiny-gemma3-64", "tiny-gemma3-96")
SMALL = {"train.steps": 1, "data.rows": 4}
# Not the default of either library.
OTHER_THETA = 1000.0


def inside(settings: Mapping[str, Any], source: Path | None = None) -> Any:
    """An arm that is recorded with all that is inside a step."""
    return {**arm({**SMALL, **settings}, source=source), "inside": True}


def other_rotary(folder: Path, name: str, older_key: float | None) -> str:
    """Folder of a Gemma-3 whose sliding layers turn at another rate: in transformers 5's words, and in older ones if given."""
    from safetensors.numpy import save_file

    made, tiny = folder / name, Tiny(name, "gemma3_text", 6, 64, 4, 1, 128, 12)
    shutil.copytree(tiny_folder("tiny-gemma3-64"), made)
    save_file(weights(tiny), made / "model.safetensors", metadata={"format": "pt"})
    config = model_config(tiny)
    config["rope_parameters"]["sliding_attention"]["rope_theta"] = OTHER_THETA
    del config["rope_local_base_freq"]
    if older_key is not None:
        config["rope_local_base_freq"] = older_key
    (made / "config.json").write_text(json.dumps(config))
    return str(made)


def record_pairs(folder: Path) -> dict[str, str]:
    """All traces: `torch NAME` and `mlx NAME`."""
    settings: dict[str, dict[str, Any]] = {name: {"model.name": name} for name in MODELS}
    settings["new rotary key"] = {"model.name": other_rotary(folder, "new", None)}
    settings["both rotary keys"] = {"model.name": other_rotary(folder, "both", OTHER_THETA)}
    settings["two micro-batches"] = {"train.accumulation": 2}
    made = record_all("torch", {f"torch {name}": inside(given) for name, given in settings.items()}, folder)
    arms = {f"mlx {name}": inside(given, Path(made[f"torch {name}"])) for name, given in settings.items()}
    arms["mlx dropout"] = inside({"lora.dropout": 0.1})
    # mlx-lm's checkpointing changes a class for good: what uses it comes last.
    arms["mlx checkpointed dropout"] = inside({"lora.dropout": 0.1, "train.checkpointing": True})
    return made | record_all("mlx", arms, folder)


@pytest.fixture(scope="session")
def traces(once: Once) -> dict[str, Path]:
    return paths_of(once("forward-pairs", record_pairs)[1])


def pair(traces: dict[str, Path], name: str) -> DiffResult:
    return diff(traces[f"torch {name}"], traces[f"mlx {name}"])


def assert_first(result: DiffResult, phase: str, name: str | None) -> None:
    assert result.verdict is Verdict.DIVERGED
    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.name) == (1, phase, name)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gemma3-64", "both rotary keys", "two micro-batches"])
def test_both_frameworks_compute_the_same_in_every_module(traces: dict[str, Path], name: str) -> None:
    result = pair(traces, name)
    assert result.verdict is Verdict.SAME, result.first
    with open_trace(traces[f"torch {name}"]) as a, open_trace(traces[f"mlx {name}"]) as b:
        rows = [trace.row(Phase.FORWARD, 1, 0) for trace in (a, b)]
        in_order = [[entry.name for entry in row.layout.entries] for row in rows if row is not None]
        assert set(in_order[0]) == set(in_order[1])
        layers = {"tiny-gemma3-64": 18, "both rotary keys": 6}.get(name, 4)
        assert len(in_order[1]) > 20 * layers
        assert in_order[1][1] == "model.embed_tokens"
        assert in_order[1][-1] == "lm_head"
        assert len(a.micro_batches(Phase.FORWARD, 1)) == len(b.micro_batches(Phase.FORWARD, 1))


def test_the_rounded_embedding_scale_of_gemma_is_found_at_the_embedding(traces: dict[str, Path]) -> None:
    result = pair(traces, "tiny-gemma3-96")
    assert_first(result, "forward", "model.embed_tokens")
    cause = result.causes[0]
    assert cause.id == "forward.scale"
    assert cause.explains is not None
    assert cause.explains > 0.99
    # bf16(sqrt(96)) / sqrt(96)
    assert cause.parameters["factor"] == pytest.approx(9.8125 / 96**0.5, rel=1e-5)
    assert [finding.name for finding in result.findings if finding.phase == "forward"] == ["model.embed_tokens"]


def test_a_rotary_rate_that_mlx_lm_does_not_read_is_found_at_the_first_attention(traces: dict[str, Path]) -> None:
    result = pair(traces, "new rotary key")
    # Queries and keys are turned between their projections and the output's, which is the first to differ.
    assert_first(result, "forward", "model.layers.0.self_attn.o_proj.base_layer")


def test_checkpointing_with_dropout_has_the_same_forward_and_loss_and_other_gradients(traces: dict[str, Path]) -> None:
    result = diff(traces["mlx dropout"], traces["mlx checkpointed dropout"])
    assert result.verdict is Verdict.DIVERGED
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (1, "grad")
    with open_trace(traces["mlx dropout"]) as a, open_trace(traces["mlx checkpointed dropout"]) as b:
        for phase in (Phase.FORWARD, Phase.LOSS):
            one, other = a.row(phase, 1, 0), b.row(phase, 1, 0)
            assert one is not None
            assert other is not None
            assert one.seal == other.seal
