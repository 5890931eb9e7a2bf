"""What MLX runs do inside a step: module outputs, losses of tokens, gradients of micro-batches.

One process trains every case of tests/programs/mlx_inside.py plain and recorded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.tracer.mlx_runs import PROGRAMS, execute, states, values
from tracer.reader import Trace, open_trace
from tracer.schema import POSITIONS, TOKEN_LOSS, Phase, State

pytest.importorskip("mlx_lm", reason="needs the extra `mlx`")

CASES = (
    "compiled", "eager", "bfloat16", "dropout",
    "checkpointed", "checkpointed later", "checkpointed eager", "checkpointed dropout",
    "made before", "reduced", "by hand", "unlabelled", "two models", "two passes", "probed", "few rows", "only losses",
)  # fmt: skip
LABELLED = tuple(case for case in CASES if case != "unlabelled")
IGNORED = -100
Array = npt.NDArray[Any]
# One layer of the model without its number: LoRA on q and v, its delta before the sum.
LAYER = (
    "input_layernorm",
    "self_attn.q_proj.base_layer", "self_attn.q_proj.lora_delta", "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj.base_layer", "self_attn.v_proj.lora_delta", "self_attn.v_proj",
    "self_attn.o_proj", "self_attn",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp", "",
)  # fmt: skip
IN_CALL_ORDER = [
    "model.embed_tokens",
    *(f"model.layers.{i}.{part}".rstrip(".") for i in range(2) for part in LAYER),
    "model.norm",
    "lm_head",
]


def in_call_order(*, dropout: bool) -> list[str]:
    """With what a dropout leaves of the input of each LoRA layer, if there is one."""
    deltas = [".lora_dropout", ".lora_delta"] if dropout else [".lora_delta"]
    return [
        name.replace(".lora_delta", part)
        for name in IN_CALL_ORDER
        for part in (deltas if name.endswith(".lora_delta") else [""])
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces and results of all cases."""
    made = tmp_path_factory.mktemp("inside")
    execute(PROGRAMS / "mlx_inside.py", made)
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def trace_of(folder: Path, case: str) -> Trace:
    return open_trace(folder / f"{case.replace(' ', '-')}.h5")


def names(trace: Trace, step: int = 1, micro_batch: int = 0) -> list[str]:
    row = trace.row(Phase.FORWARD, step, micro_batch)
    assert row is not None
    return [entry.name for entry in row.layout.entries]


def test_every_case_of_the_program_is_looked_at(results: dict[str, Any]) -> None:
    assert tuple(results) == CASES


# Recording never changes the run.


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_is_looked_into_is_bit_identical(results: dict[str, Any], case: str) -> None:
    assert results[case]["recorded"] == results[case]["plain"]


@pytest.mark.parametrize("case", ["compiled", "eager", "checkpointed later"])
def test_a_run_after_the_recording_is_bit_identical_too(results: dict[str, Any], case: str) -> None:
    assert results[case]["again"] == results[case]["plain"]


def test_checkpointing_with_dropout_is_another_run(results: dict[str, Any]) -> None:
    assert results["checkpointed dropout"]["plain"] != results["dropout"]["plain"]
    assert results["checkpointed"]["plain"] == results["compiled"]["plain"]


@pytest.mark.parametrize("case", CASES)
def test_the_classes_of_the_model_are_left_as_they_were(results: dict[str, Any], case: str) -> None:
    left = {results[case][f"{run} left"] for run in ("plain", "recorded")}
    # mlx-lm's own change of the class, made while recording or before, is mlx-lm's.
    assert left == {"grad_checkpoint.<locals>.checkpointed_fn" if "checkpointed" in case else "clean"}


# What is recorded is what happened.


@pytest.mark.parametrize("case", ["compiled", "eager", "dropout", "checkpointed", "checkpointed later",
                                  "checkpointed eager", "checkpointed dropout", "made before", "two models"])  # fmt: skip
def test_each_module_is_recorded_once_in_call_order(folder: Path, case: str) -> None:
    with trace_of(folder, case) as trace:
        for step in (1, 2):
            assert trace.micro_batches(Phase.FORWARD, step) == (0, 1)
            for micro_batch in (0, 1):
                assert names(trace, step, micro_batch) == [POSITIONS, *in_call_order(dropout="dropout" in case)]


@pytest.mark.parametrize("case", ["compiled", "eager", "checkpointed", "made before", "two models"])
def test_outputs_are_those_of_the_modules_called_one_by_one(folder: Path, case: str) -> None:
    with np.load(folder / "expected.npz") as expected, trace_of(folder, case) as trace:
        found = values(trace, Phase.FORWARD, 1, 0)
        rows, columns = found[POSITIONS].T
        for name in expected:
            own = expected[name][rows, columns]
            assert found[name].shape == own.shape
            assert np.abs(found[name] - own).max() <= 2e-6 * np.abs(own).max(), name
        assert np.abs(found["model.layers.1"]).max() > 0


def test_another_model_of_the_same_class_leaves_no_record(folder: Path) -> None:
    with trace_of(folder, "two models") as trace, trace_of(folder, "compiled") as alone:
        one, other = (values(each, Phase.FORWARD, 1, 0) for each in (trace, alone))
        assert all(np.array_equal(one[name], other[name]) for name in IN_CALL_ORDER)


def test_positions_are_those_before_the_last_supervised_token(folder: Path) -> None:
    with trace_of(folder, "compiled") as trace:
        found = values(trace, Phase.FORWARD, 1, 0)[POSITIONS]
        labels = values(trace, Phase.BATCH, 1, 0)["labels"]
    last = [int(np.flatnonzero(row != IGNORED)[-1]) for row in labels]
    assert found.tolist() == [[row, t] for row in range(2) for t in range(last[row])]


def test_a_second_pass_through_the_model_has_names_of_its_own(folder: Path) -> None:
    with trace_of(folder, "two passes") as trace:
        found = names(trace)
        assert found == [POSITIONS, *IN_CALL_ORDER, *(f"{name}#2" for name in IN_CALL_ORDER)]
        outputs = values(trace, Phase.FORWARD, 1, 0)
    assert all(np.array_equal(outputs[name], outputs[f"{name}#2"]) for name in IN_CALL_ORDER)


def test_a_stopped_output_that_nothing_uses_is_recorded_in_a_compiled_step(folder: Path) -> None:
    with trace_of(folder, "probed") as trace:
        assert names(trace)[:3] == [POSITIONS, "model.embed_tokens", "probe"]
        found = values(trace, Phase.FORWARD, 1, 0)
        own = np.tanh(found["model.embed_tokens"].astype(np.float64)).sum(-1, keepdims=True)
    assert np.allclose(found["probe"], own, rtol=1e-5, atol=1e-6)


def test_modules_and_rows_can_be_chosen(folder: Path) -> None:
    with trace_of(folder, "few rows") as trace, trace_of(folder, "compiled") as whole:
        assert names(trace) == [POSITIONS, "model.layers.1.self_attn.q_proj.lora_delta", "lm_head"]
        few, all_rows = values(trace, Phase.FORWARD, 1, 0), values(whole, Phase.FORWARD, 1, 0)
    assert len(few[POSITIONS]) == 3
    at = [all_rows[POSITIONS].tolist().index(pair) for pair in few[POSITIONS].tolist()]
    for name in (each for each in few if each != POSITIONS):
        assert np.array_equal(few[name], all_rows[name][at]), name


def test_where_the_labels_are_not_known_all_positions_are_taken_and_no_token_has_a_loss(folder: Path) -> None:
    with trace_of(folder, "unlabelled") as trace:
        assert names(trace) == [POSITIONS, *IN_CALL_ORDER]
        assert values(trace, Phase.FORWARD, 1, 0)[POSITIONS].tolist() == [
            [row, t] for row in range(2) for t in range(9)
        ]
        assert states(trace, Phase.LOSS, 1, 0) == {"loss": State.VALUE, TOKEN_LOSS: State.UNRECORDED}


def test_outputs_are_in_the_dtype_of_the_run(folder: Path) -> None:
    with trace_of(folder, "bfloat16") as trace:
        row = trace.row(Phase.FORWARD, 1, 0)
        assert row is not None
        assert {entry.dtype for entry in row.layout.entries if entry.name != POSITIONS} == {"bfloat16"}


def test_without_the_phase_no_module_is_recorded(folder: Path) -> None:
    with trace_of(folder, "only losses") as trace:
        assert Phase.FORWARD not in trace.phases
        assert TOKEN_LOSS in values(trace, Phase.LOSS, 1, 0)


@pytest.mark.parametrize("case", [case for case in LABELLED if case != "only losses"])
def test_losses_of_tokens_follow_from_the_recorded_logits(folder: Path, case: str) -> None:
    room = 2e-2 if case == "bfloat16" else 2e-6
    with trace_of(folder, case) as trace:
        for step, micro_batch in ((1, 0), (1, 1), (2, 0), (2, 1)):
            found, batch = (
                values(trace, Phase.FORWARD, step, micro_batch),
                values(trace, Phase.BATCH, step, micro_batch),
            )
            losses = values(trace, Phase.LOSS, step, micro_batch)[TOKEN_LOSS]
            labels = batch["labels"]
            assert losses.dtype == np.float32
            assert losses.shape == labels.shape
            assert (losses[labels == IGNORED] == 0).all()
            checked = []
            for (row, t), logits in zip(found[POSITIONS], found["lm_head"].astype(np.float64), strict=True):
                if labels[row, t + 1] != IGNORED:
                    expected = np.log(np.exp(logits).sum()) - logits[labels[row, t + 1]]
                    assert abs(losses[row, t + 1] - expected) <= room * max(1.0, expected)
                    checked.append((row, t))
            assert len(checked) >= 2


@pytest.mark.parametrize("case", LABELLED)
def test_the_loss_is_the_mean_of_the_losses_of_the_tokens(folder: Path, case: str) -> None:
    with trace_of(folder, case) as trace:
        for micro_batch in (0, 1):
            found, batch = values(trace, Phase.LOSS, 2, micro_batch), values(trace, Phase.BATCH, 2, micro_batch)
            mean = found[TOKEN_LOSS].astype(np.float64).sum() / np.count_nonzero(batch["labels"] != IGNORED)
            assert abs(mean - found["loss"]) <= 1e-6 * mean
            # One wrong token would show.
            assert abs(mean - found["loss"]) < 0.1 * found[TOKEN_LOSS].max() / found[TOKEN_LOSS].size


@pytest.mark.parametrize("case", ["compiled", "eager", "dropout", "checkpointed dropout", "made before"])
def test_the_gradient_is_the_mean_of_those_of_the_micro_batches(folder: Path, case: str) -> None:
    with trace_of(folder, case) as trace:
        for step in (1, 2):
            assert trace.micro_batches(Phase.GRAD, step) == (-1, 0, 1)
            whole, *each = (values(trace, Phase.GRAD, step, micro_batch) for micro_batch in (-1, 0, 1))
            assert set(whole) == set(each[0]) == set(each[1])
            for name, gradient in whole.items():
                mean = (each[0][name] + each[1][name]) / np.float32(2)
                assert np.array_equal(mean, gradient), name
                assert not np.array_equal(each[0][name], gradient), name


def test_checkpointing_with_dropout_has_the_forward_of_the_run_without_and_other_gradients(folder: Path) -> None:
    with trace_of(folder, "dropout") as trace, trace_of(folder, "checkpointed dropout") as redrawn:
        for phase in (Phase.FORWARD, Phase.LOSS):
            one, other = (each.row(phase, 1, 0) for each in (trace, redrawn))
            assert one is not None
            assert other is not None
            assert one.seal == other.seal
        plain, wrong = (values(each, Phase.GRAD, 1, 0) for each in (trace, redrawn))
        differing = {name for name in plain if not np.allclose(plain[name], wrong[name], rtol=1e-3, atol=1e-6)}
        assert len(differing) > len(plain) / 2


def test_checkpointing_without_dropout_is_the_same_run(folder: Path) -> None:
    with trace_of(folder, "compiled") as trace, trace_of(folder, "checkpointed") as checkpointed:
        for phase in (Phase.FORWARD, Phase.LOSS, Phase.GRAD, Phase.PARAM):
            for micro_batch in trace.micro_batches(phase, 2):
                one, other = (each.row(phase, 2, micro_batch) for each in (trace, checkpointed))
                assert one is not None
                assert other is not None
                assert one.seal == other.seal
