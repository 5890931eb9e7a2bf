"""Options about the inside of a model, and canonical names of modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tracer.test_cli import only_line, trace
from tracer.names import NameMap, is_usual_module
from tracer.reader import open_trace
from tracer.recorder import DEFAULT_PHASES, Recorder, RecordOptions
from tracer.schema import POSITIONS, Phase, Record

PROGRAM = """
import numpy as np, tracer
from tracer.recorder import current
from tracer.schema import Phase, Record
recorder = current()
options = recorder.options
one = lambda name: Record(name, np.ones(2, np.float32), "float32", (2,))
recorder.add(Phase.INIT, [one("w")])
recorder.end_step()
for name in ("positions", "model.layers.0.mlp", "model.layers.0.self_attn", "lm_head"):
    if name == "positions" or recorder.wants_module(name):
        recorder.add(Phase.FORWARD, [one(name)], 0)
recorder.add(Phase.GRAD, [one("w")])
recorder.observe("seen", [options.forward_rows, options.micro_grads, options.token_loss])
recorder.end_step()
"""


@pytest.mark.parametrize("twin", [False, True], ids=["here", "in processes of their own"])
def test_options_about_the_inside_reach_the_recorder(tmp_path: Path, twin: bool) -> None:
    (tmp_path / "run.py").write_text(PROGRAM)
    given = [
        "--what",
        "all",
        "--modules",
        "*.mlp",
        "--modules",
        "lm_head",
        "--forward-rows",
        7,
        "--micro-grads",
        "--token-loss",
    ]
    done = trace("record", "-o", tmp_path / "run.h5", *given, *["--twin"] * twin, "--", tmp_path / "run.py")
    for name in ("run.h5", "run.twin.h5")[: 1 + twin]:
        with open_trace(tmp_path / name) as written:
            assert written.observed["seen"] == [7, True, True], done.stderr
            row = written.row(Phase.FORWARD, 1, 0)
            assert row is not None
            assert [entry.name for entry in row.layout.entries] == [POSITIONS, "model.layers.0.mlp", "lm_head"]


@pytest.mark.parametrize(
    ("option", "what", "phase"),
    [
        (["--modules", "*.mlp"], None, "forward"),
        (["--micro-grads"], "forward,loss", "grad"),
        (["--token-loss"], "forward,grad", "loss"),
    ],
)
def test_a_detail_of_a_phase_that_is_not_recorded_is_refused(
    tmp_path: Path, option: list[str], what: str | None, phase: str
) -> None:
    chosen = ["--what", what] if what else []
    done = trace("record", "-o", tmp_path / "run.h5", *chosen, *option, "--", "run.py")
    assert done.returncode == 2
    assert f"{option[0]} needs phase {phase}" in only_line(done.stderr)
    assert not (tmp_path / "run.h5").exists()


def test_module_outputs_are_recorded_only_when_asked_for() -> None:
    assert Phase.FORWARD not in DEFAULT_PHASES


def test_names_that_narrow_leave_the_positions(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "run.h5", RecordOptions(what=frozenset(Phase), only=("*.mlp", "w")))
    assert [recorder.wants_module(name) for name in ("model.layers.0.mlp", "lm_head")] == [True, False]
    for name in ("w", POSITIONS):
        phase = Phase.INIT if name == "w" else Phase.FORWARD
        recorder.add(phase, [Record(name, np.ones(2, np.float32), "float32", (2,))], 0)
        recorder.end_step()
    recorder.close()
    with open_trace(tmp_path / "run.h5") as written:
        assert written.micro_batches(Phase.FORWARD, 1) == (0,)


@pytest.mark.parametrize(
    ("original", "canonical"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.q_proj"),
        ("base_model.model.model.layers.3.self_attn.q_proj.base_layer", "model.layers.3.self_attn.q_proj.base_layer"),
        ("model.layers.3.self_attn.q_proj.linear", "model.layers.3.self_attn.q_proj.base_layer"),
        ("module._orig_mod.model.norm", "model.norm"),
        ("model.embed_tokens.embedding", "model.embed_tokens.base_layer"),
        ("lm_head.linear", "lm_head.base_layer"),
        ("language_model.model.layers.0.mlp", "model.language_model.layers.0.mlp"),
    ],
)
def test_modules_of_every_library_have_one_name(original: str, canonical: str) -> None:
    assert NameMap()(original).name == canonical
    assert NameMap()(canonical).name == canonical
    assert is_usual_module(canonical)


@pytest.mark.parametrize(
    "name",
    [
        "model", "base_model.model", "model.rotary_emb", "model.layers.0.mlp.act_fn", "model.layers.0.self_attn.attn_dropout",
        "model.layers.0.self_attn.q_proj.lora_A.default", "model.layers.0.self_attn.q_proj.lora_dropout.default",
        "lm_head.modules_to_save.default", "lm_head.original_module",
    ],
)  # fmt: skip
def test_wrappers_activations_and_the_parts_of_an_adapter_are_left_out(name: str) -> None:
    assert not is_usual_module(name)


def test_what_lora_adds_is_a_usual_output() -> None:
    assert is_usual_module("model.layers.0.self_attn.q_proj.lora_delta")
