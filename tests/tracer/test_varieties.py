"""Full fine-tuning, DoRA, quantized bases, saved modules, autocast, several adapters: recorded whole, without touching a bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from differ.engine import diff
from tracer.cli.check import check_trace
from tracer.reader import Trace, open_trace
from tracer.schema import Phase, State

ROOT = Path(__file__).parents[2]
Q0 = "model.layers.0.self_attn.q_proj"
TORCH = (
    "dora", "rslora", "modules_to_save", "tied_modules_to_save", "embeddings", "full", "unfrozen_later", "autocast",
    "second_model", "two_adapters", "checkpointed", "compiled",
)  # fmt: skip
MLX = ("full", "dora", "quantized_4", "quantized_8", "quantized_dora", "lion", "adafactor", "muon", "sgd")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name in ("torch", "mlx"):
        (folder / name).mkdir()
        program = ROOT / "tests" / "programs" / ("peft_varieties.py" if name == "torch" else "mlx_varieties.py")
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, program, folder / name], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def states(trace: Trace, phase: Phase, step: int) -> dict[str, State]:
    row = trace.row(phase, step)
    assert row is not None
    names = [entry.name for entry in row.layout.entries]
    return {name: row.state(i) for i, name in enumerate(names) if not name.startswith(("rng.", "reported."))}


def stored(trace: Trace, name: str) -> bool:
    row = trace.row(Phase.INIT, 0)
    assert row is not None
    return row.stored(row.layout.positions[name])


@pytest.mark.parametrize("case", [*(f"torch/{name}" for name in TORCH), *(f"mlx/{name}" for name in MLX)])
def test_every_variety_is_recorded_whole_and_not_changed_by_a_bit(runs: Path, case: str) -> None:
    framework, name = case.split("/")
    plain, recorded = json.loads((runs / framework / "digests.json").read_text())[name]
    assert plain == recorded
    with open_trace(runs / f"{case}.h5") as trace:
        assert trace.finished
        assert trace.steps == (0, 1, 2, 3)
        assert check_trace(trace).problems == ()
        trained = states(trace, Phase.PARAM, 3).keys()
        assert trained
        for phase in (Phase.GRAD, Phase.CLIPPED_GRAD):
            found = states(trace, phase, 3)
            assert found.keys() == trained
            assert State.UNRECORDED not in found.values()


def test_the_comparison_of_digests_finds_another_run(runs: Path) -> None:
    digests = json.loads((runs / "torch" / "digests.json").read_text())
    assert digests["dora"][0] != digests["rslora"][0]


def test_dora_has_its_magnitudes_under_one_name_in_both_libraries(runs: Path) -> None:
    for case in ("torch/dora", "mlx/dora", "mlx/quantized_dora"):
        with open_trace(runs / f"{case}.h5") as trace:
            assert f"{Q0}.lora_magnitude_vector.weight" in states(trace, Phase.PARAM, 1)


def test_a_module_that_is_trained_in_a_copy_has_the_name_of_the_checkpoint(runs: Path) -> None:
    for case in ("modules_to_save", "tied_modules_to_save"):
        with open_trace(runs / "torch" / f"{case}.h5") as trace:
            names = states(trace, Phase.PARAM, 1)
            assert {"model.embed_tokens.weight", "lm_head.weight"} <= names.keys()
            assert stored(trace, "model.embed_tokens.weight")
            assert not stored(trace, "model.embed_tokens.original_module.weight")


def test_a_parameter_that_becomes_trainable_is_there_from_that_step_on(runs: Path) -> None:
    with open_trace(runs / "torch" / "unfrozen_later.h5") as trace:
        assert not stored(trace, "model.norm.weight")
        present = ["model.norm.weight" in states(trace, Phase.GRAD, step) for step in (1, 2, 3)]
        assert present == [False, True, True]
        assert "group1.lr" in states(trace, Phase.HPARAMS, 2)


def test_of_two_adapters_the_idle_one_is_frozen_and_keeps_its_name(runs: Path) -> None:
    with open_trace(runs / "torch" / "two_adapters.h5") as trace:
        assert not stored(trace, f"{Q0}.lora_A.weight#other")
        assert stored(trace, f"{Q0}.lora_A.weight")
        assert not [name for name in states(trace, Phase.PARAM, 1) if "#" in name]


def test_a_second_model_in_the_process_is_no_part_of_the_trace(runs: Path) -> None:
    with open_trace(runs / "torch" / "second_model.h5") as second, open_trace(runs / "torch" / "rslora.h5") as alone:
        assert states(second, Phase.INIT, 0).keys() == states(alone, Phase.INIT, 0).keys()
        assert second.micro_batches(Phase.BATCH, 1) == (0,)


def test_a_quantized_base_is_frozen_in_its_own_form(runs: Path) -> None:
    for case in ("quantized_4", "quantized_8"):
        with open_trace(runs / "mlx" / f"{case}.h5") as trace:
            for part in ("weight", "scales", "biases"):
                assert not stored(trace, f"{Q0}.{part}")
    bits = diff(runs / "mlx" / "quantized_4.h5", runs / "mlx" / "quantized_8.h5")
    assert bits.first is not None
    assert (bits.first.phase, bits.first.step) == ("init", 0)


def test_the_scale_of_rslora_is_alpha_over_the_root_of_the_rank(runs: Path) -> None:
    result = diff(runs / "torch" / "second_model.h5", runs / "torch" / "rslora.h5")
    assert result.first is not None
    assert (result.first.phase, result.first.name) == ("init", f"{Q0}.lora_scale")
    assert (result.first.a, result.first.b) == (2.0, 4.0)


def test_checkpointing_and_compiling_change_nothing_that_is_recorded(runs: Path) -> None:
    for case in ("checkpointed", "compiled"):
        result = diff(runs / "torch" / "second_model.h5", runs / "torch" / f"{case}.h5")
        assert result.verdict == "same", case
