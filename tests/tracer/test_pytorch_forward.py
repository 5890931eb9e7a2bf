"""The insides of PyTorch runs: module outputs, losses of tokens, gradients of micro-batches.

One process trains every case of tests/programs/torch_forward.py plain and recorded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import DiffResult, Verdict, diff
from tracer.dtypes import bf16_to_float32, float32_to_bf16, to_float64
from tracer.positions import IGNORED, relevant_positions
from tracer.reader import RowView, Trace, open_trace
from tracer.schema import POSITIONS, TOKEN_LOSS, Phase, State

pytest.importorskip("peft", reason="needs the extra `torch`")

ROOT = Path(__file__).parents[2]
CASES = (
    "plain", "embedding_scaled", "output_shifted", "positions_shifted_from_six_on", "lora_scaled_after_the_first_step",
    "checkpointing", "checkpointing_reentrant", "checkpointing_selective", "autocast", "bfloat16", "accumulated",
    "weighted_by_tokens", "scaled_loss", "compiled", "partly_compiled", "labels_kept_from_the_model", "evaluated_between_steps",
    "some_modules", "rotary_table", "all_parameters", "a_loss_of_its_own",
)  # fmt: skip
# An adapted layer: what its dropout leaves of its input, and its delta before the sum.
ADAPTED = (".base_layer", ".lora_dropout", ".lora_delta", "")
# One layer of the model without its number: LoRA on q, v and down.
LAYER = (
    "input_layernorm", *(f"self_attn.q_proj{part}" for part in ADAPTED),
    "self_attn.k_proj", *(f"self_attn.v_proj{part}" for part in ADAPTED), "self_attn.o_proj", "self_attn",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", *(f"mlp.down_proj{part}" for part in ADAPTED), "mlp", "",
)  # fmt: skip
IN_CALL_ORDER = [
    POSITIONS,
    "model.embed_tokens",
    *(f"model.layers.{i}.{part}".rstrip(".") for i in range(2) for part in LAYER),
    "model.norm",
    "lm_head",
]

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, bool]]:
    """The folder with the traces, and by case whether the recorded run was the plain one to the bit."""
    folder = tmp_path_factory.mktemp("forward")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STEPTRACE_DEBUG": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "programs" / "torch_forward.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "recording stopped" not in done.stderr, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    return folder, {found["case"]: found["same"] for found in said}


@pytest.fixture(scope="module")
def folder(runs: tuple[Path, Mapping[str, bool]]) -> Path:
    return runs[0]


def names(view: RowView) -> list[str]:
    return [entry.name for entry in view.layout.entries]


def stored(view: RowView, name: str) -> Array:
    return view.read(view.layout.positions[name])


def values(view: RowView, name: str) -> Array:
    return to_float64(stored(view, name), view.layout.entries[view.layout.positions[name]].dtype)


def row(trace: Trace, phase: Phase, step: int = 1, micro_batch: int = -1) -> RowView:
    view = trace.row(phase, step, micro_batch)
    assert view is not None, f"no {phase.label} at step {step}"
    return view


def against_plain(folder: Path, case: str) -> DiffResult:
    return diff(folder / "plain.h5", folder / f"{case}.h5")


@pytest.mark.parametrize("case", CASES)
def test_recording_the_inside_of_a_model_changes_no_bit_of_the_run(
    runs: tuple[Path, Mapping[str, bool]], case: str
) -> None:
    assert runs[1][case]
    assert set(runs[1]) == set(CASES)


@pytest.mark.parametrize(
    "case", ["plain", "checkpointing", "checkpointing_reentrant", "checkpointing_selective", "bfloat16"]
)
def test_every_module_is_recorded_once_in_call_order_under_its_canonical_name(folder: Path, case: str) -> None:
    with open_trace(folder / f"{case}.h5") as trace:
        assert names(row(trace, Phase.FORWARD, 2, 0)) == IN_CALL_ORDER


def test_outputs_are_kept_at_the_positions_that_can_reach_the_loss(folder: Path) -> None:
    with open_trace(folder / "accumulated.h5") as trace:
        for number in range(3):
            batch, forward = row(trace, Phase.BATCH, 1, number), row(trace, Phase.FORWARD, 1, number)
            expected = relevant_positions(stored(batch, "labels"), stored(batch, "attention_mask"), 64)
            np.testing.assert_array_equal(stored(forward, POSITIONS), expected)
            shapes = {entry.name: entry.shape for entry in forward.layout.entries}
            assert shapes["lm_head"] == (len(expected), 61)
            assert shapes["model.embed_tokens"] == (len(expected), 32)


@pytest.mark.parametrize("case", ["plain", "bfloat16"])
def test_the_embedding_and_what_lora_adds_are_what_they_are_called(folder: Path, case: str) -> None:
    with open_trace(folder / f"{case}.h5") as trace:
        forward = row(trace, Phase.FORWARD, 2, 0)
        q = "model.layers.1.self_attn.q_proj"
        output, base, delta = (stored(forward, name) for name in (q, f"{q}.base_layer", f"{q}.lora_delta"))
        rounded = case == "bfloat16"
        expected = float32_to_bf16(bf16_to_float32(output) - bf16_to_float32(base)) if rounded else output - base
        np.testing.assert_array_equal(delta, expected)
        assert np.any(delta)
        # B is zero before the first update, and LoRA adds nothing.
        first = row(trace, Phase.FORWARD, 1, 0)
        assert first.state(first.layout.positions[f"{q}.lora_delta"]) is State.ZERO


def test_losses_of_tokens_follow_from_the_recorded_logits_and_reduce_to_the_loss(folder: Path) -> None:
    with open_trace(folder / "accumulated.h5") as trace:
        for number in range(3):
            batch, forward = row(trace, Phase.BATCH, 1, number), row(trace, Phase.FORWARD, 1, number)
            loss = row(trace, Phase.LOSS, 1, number)
            labels, tokens = stored(batch, "labels"), values(loss, TOKEN_LOSS)
            logits = dict(zip(map(tuple, stored(forward, POSITIONS).tolist()), values(forward, "lm_head"), strict=True))
            for (i, t), label in np.ndenumerate(labels):
                if label == IGNORED:
                    assert tokens[i, t] == 0.0
                else:
                    scores = logits[i, t - 1]
                    expected = np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[label]
                    assert tokens[i, t] == pytest.approx(expected, rel=1e-5, abs=1e-6)
            assert tokens.sum() / (labels != IGNORED).sum() == pytest.approx(float(values(loss, "loss")), rel=1e-6)


def test_a_loss_that_is_not_torchs_has_unrecorded_losses_of_tokens(folder: Path) -> None:
    with open_trace(folder / "a_loss_of_its_own.h5") as trace:
        loss = row(trace, Phase.LOSS, 1, 0)
        assert names(loss) == [TOKEN_LOSS, "loss"]
        assert loss.state(0) is State.UNRECORDED


@pytest.mark.parametrize("case", ["weighted_by_tokens", "bfloat16", "checkpointing_reentrant"])
def test_the_gradients_of_the_micro_batches_add_up_to_the_accumulated_one_to_the_bit(folder: Path, case: str) -> None:
    with open_trace(folder / f"{case}.h5") as trace:
        accumulated = row(trace, Phase.GRAD, 2)
        count = len(trace.micro_batches(Phase.LOSS, 2))
        parts = [row(trace, Phase.GRAD, 2, number) for number in range(count)]
        for entry in accumulated.layout.entries:
            total = stored(parts[0], entry.name)
            for part in parts[1:]:
                if entry.dtype == "bfloat16":
                    total = float32_to_bf16(bf16_to_float32(total) + bf16_to_float32(stored(part, entry.name)))
                else:
                    total = total + stored(part, entry.name)
            np.testing.assert_array_equal(total, stored(accumulated, entry.name))


def test_a_scaled_loss_has_unscaled_gradients_of_its_micro_batches(folder: Path) -> None:
    with open_trace(folder / "scaled_loss.h5") as trace:
        total = row(trace, Phase.GRAD)
        name = "model.layers.1.mlp.down_proj.lora_B.weight"
        parts = [values(row(trace, Phase.GRAD, 1, number), name) for number in range(2)]
        np.testing.assert_allclose(sum(parts), values(total, name), rtol=1e-5, atol=1e-9)
        assert all(np.linalg.norm(part) > 0.0 for part in parts)


@pytest.mark.parametrize(("case", "seen"), [("compiled", {"lm_head"}), ("partly_compiled", None)])
def test_of_compiled_code_is_recorded_what_can_be_seen_and_the_trace_says_so(
    folder: Path, case: str, seen: set[str] | None
) -> None:
    hidden = {name for name in IN_CALL_ORDER if name.startswith("model.layers.0.mlp")}
    with open_trace(folder / f"{case}.h5") as trace:
        assert set(names(row(trace, Phase.FORWARD, 1, 0))) == {POSITIONS, *(seen or set(IN_CALL_ORDER) - hidden)}
        assert "compiled" in trace.observed["forward.unrecorded"]
    result = against_plain(folder, case)
    assert result.verdict is Verdict.SAME
    assert [note.side for note in result.notes if note.id == "forward.modules"] == ["a"]


def test_labels_that_only_the_loop_knows_choose_the_positions_all_the_same(folder: Path) -> None:
    with open_trace(folder / "labels_kept_from_the_model.h5") as trace:
        labels = stored(row(trace, Phase.BATCH, 1, 0), "labels")
        forward = row(trace, Phase.FORWARD, 1, 0)
        np.testing.assert_array_equal(stored(forward, POSITIONS), relevant_positions(labels, None, 8))
        assert row(trace, Phase.LOSS, 1, 0).state(0) is State.VALUE
    assert against_plain(folder, "labels_kept_from_the_model").verdict is Verdict.SAME


def test_evaluations_between_steps_and_forwards_that_raise_are_not_recorded(folder: Path) -> None:
    result = against_plain(folder, "evaluated_between_steps")
    assert (result.verdict, result.counts.same_bits) == (Verdict.SAME, result.counts.compared)
    with open_trace(folder / "evaluated_between_steps.h5") as trace:
        assert [trace.micro_batches(Phase.FORWARD, step) for step in (1, 2)] == [(0,), (0,)]


def test_modules_are_chosen_by_glob_and_rows_by_number(folder: Path) -> None:
    with open_trace(folder / "some_modules.h5") as trace:
        forward = row(trace, Phase.FORWARD, 1, 0)
        # An activation is recorded if it is asked for, and by default not.
        each = [
            f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.v_proj.lora_delta", "mlp.act_fn", "mlp")
        ]
        assert names(forward) == [POSITIONS, *each, "lm_head"]
        assert stored(forward, POSITIONS).shape == (5, 2)


def test_a_table_that_all_rows_share_is_recorded_at_every_position(folder: Path) -> None:
    with open_trace(folder / "rotary_table.h5") as trace:
        forward = row(trace, Phase.FORWARD, 1, 0)
        assert names(forward) == [POSITIONS, "model.rotary_emb"]
        positions = stored(forward, POSITIONS)
        assert set(positions[:, 0]) == {0, 1}
        # Head size 8: four rates, each twice.
        angles = positions[:, 1, None] * np.tile(1e4 ** (-np.arange(4) / 4), 2)
        np.testing.assert_allclose(stored(forward, "model.rotary_emb"), np.cos(angles), atol=1e-6)


def test_autocast_outputs_have_the_dtype_that_they_were_computed_in(folder: Path) -> None:
    with open_trace(folder / "autocast.h5") as trace:
        dtypes = {entry.name: entry.dtype for entry in row(trace, Phase.FORWARD, 1, 0).layout.entries}
        assert dtypes["model.layers.0.self_attn.q_proj"] == "bfloat16"
        assert dtypes["model.embed_tokens"] == "float32"


def test_what_a_dropout_leaves_is_zero_or_scaled(folder: Path) -> None:
    with open_trace(folder / "plain.h5") as trace:
        forward = row(trace, Phase.FORWARD, 1, 0)
        given = stored(forward, "model.layers.0.input_layernorm")
        left = stored(forward, "model.layers.0.self_attn.q_proj.lora_dropout")
        kept = left != 0
        np.testing.assert_allclose(left[kept], given[kept] / 0.9, rtol=1e-6)
        assert 0.05 < 1 - kept.mean() < 0.15


def test_a_model_without_adapters_has_no_base_layers(folder: Path) -> None:
    plain = [name for name in IN_CALL_ORDER if not name.endswith(ADAPTED[:-1])]
    with open_trace(folder / "all_parameters.h5") as trace:
        assert names(row(trace, Phase.FORWARD, 1, 0)) == plain


@pytest.mark.parametrize("case", ["checkpointing", "checkpointing_reentrant"])
def test_the_same_run_with_and_without_checkpointing_is_the_same_to_the_bit(folder: Path, case: str) -> None:
    result = against_plain(folder, case)
    assert (result.verdict, result.counts.same_bits) == (Verdict.SAME, result.counts.compared)


@pytest.mark.parametrize(
    ("case", "step", "name", "cause"),
    [
        ("embedding_scaled", 1, "model.embed_tokens", "forward.scale"),
        ("output_shifted", 1, "model.layers.1.mlp.up_proj", ""),
        ("positions_shifted_from_six_on", 1, "model.layers.0.self_attn.o_proj", "forward.position"),
        ("lora_scaled_after_the_first_step", 2, "model.layers.1.self_attn.v_proj.lora_delta", "forward.scale"),
    ],
)
def test_a_fault_inside_the_model_is_named_at_the_first_module_that_it_changes(
    folder: Path, case: str, step: int, name: str, cause: str
) -> None:
    result = against_plain(folder, case)
    (finding,) = [found for found in result.findings if found.step == step]
    assert result.first == finding
    assert (finding.phase, finding.name, finding.micro_batch) == ("forward", name, 0)
    assert "position" in finding.detail
    found = {c.id: c for c in result.causes if c.id.startswith("forward")}
    assert set(found) == ({cause} if cause else set())
    parameters = found[cause].parameters if cause else None
    if case == "embedding_scaled":
        assert parameters == {"factor": 1.01, "matches": ""}
    if case == "positions_shifted_from_six_on":
        assert parameters == {"kind": "from", "position": 6}
    if case == "lora_scaled_after_the_first_step":
        assert parameters is not None
        assert parameters["factor"] == pytest.approx(1.5, rel=1e-3)


def test_micro_batches_weighted_by_their_tokens_on_one_side_only_are_named(folder: Path) -> None:
    for a, b, side in (("accumulated", "weighted_by_tokens", "a"), ("weighted_by_tokens", "accumulated", "b")):
        result = diff(folder / f"{a}.h5", folder / f"{b}.h5")
        assert result.first is not None
        assert (result.first.step, result.first.phase, result.first.micro_batch) == (1, "grad", None)
        (cause,) = [c for c in result.causes if c.id == "grad.mean_of_means" and c.step == 1]
        assert cause.side == side
        assert cause.explains is not None
        assert cause.explains > 0.99
