"""Recording MLX runs: real programs, each in its own process, with and without the recorder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tracer.mlx_runs import PROGRAMS, Run, Runner, execute, parameters_before, run_program, states, traced, values
from tracer.reader import Trace, open_trace
from tracer.schema import Phase, State

pytest.importorskip("mlx.core", reason="needs the extra `mlx`")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Run a program once per module and arguments: `run("mlx_loops.py", "eager_value", recorded=True)`."""
    known: dict[Any, Run] = {}

    def once(program: str, *arguments: str, recorded: bool) -> Run:
        key = (program, arguments, recorded)
        if key not in known:
            known[key] = run_program(tmp_path_factory.mktemp("run"), program, arguments, recorded)
        return known[key]

    return once


LOOPS = (
    "compiled_norm",
    "eager_value",
    "made_before",
    "partly_compiled",
    "functional",
    "functional_direct",
    "nested",
    "per_example",
    "two_optimizers",
)
LM_RUNS = (("float32", "3", "0.05"), ("bfloat16", "3", "0.05"))


# Recording never changes the run.


@pytest.mark.parametrize("loop", [*LOOPS, "compiled_unseen"])
def test_a_hand_written_loop_is_bit_identical_with_and_without_the_recorder(run: Runner, loop: str) -> None:
    plain, recorded = (run("mlx_loops.py", loop, recorded=flag) for flag in (False, True))
    assert recorded.result == plain.result
    assert all(np.array_equal(recorded.gradients[name], plain.gradients[name]) for name in plain.gradients)


def test_one_random_number_more_is_not_bit_identical(run: Runner) -> None:
    plain, touched = (run("mlx_loops.py", loop, recorded=False) for loop in ("compiled_norm", "touched"))
    assert touched.result["losses"] != plain.result["losses"]
    assert touched.result["rng"] != plain.result["rng"]
    assert touched.result["parameters"] != plain.result["parameters"]
    assert touched.result["optimizer"] != plain.result["optimizer"]


@pytest.mark.parametrize("arguments", LM_RUNS)
def test_mlx_lm_train_is_bit_identical_with_dropout_and_accumulation(run: Runner, arguments: tuple[str, ...]) -> None:
    plain, recorded = (run("mlx_lm_train.py", *arguments, recorded=flag) for flag in (False, True))
    assert recorded.result == plain.result
    with traced(recorded) as trace:
        assert trace.finished
        assert trace.steps == (0, 1, 2)


def test_the_mlx_lm_command_line_leaves_identical_adapters(tmp_path: Path) -> None:
    execute(PROGRAMS / "mlx_lm_files.py", tmp_path / "run")
    adapters = []
    for arm in ("plain", "recorded"):
        head = [PROGRAMS / "run_recorded.py", tmp_path / "run.h5"] if arm == "recorded" else []
        command = ["-m", "mlx_lm", "lora", "--config", tmp_path / "run" / "config.yaml"]
        execute(*head, *command, "--adapter-path", tmp_path / arm)
        adapters.append(hashlib.sha256((tmp_path / arm / "adapters.safetensors").read_bytes()).hexdigest())
    assert adapters[0] == adapters[1]
    with open_trace(tmp_path / "run.h5") as trace:
        observed = trace.observed
        assert trace.steps == (0, 1, 2, 3, 4)
        # mlx-lm imports transformers, and that imports torch: what trains is MLX all the same.
        assert observed["framework"] == "mlx"
        assert observed["trainer.class"] == "mlx_lm.tuner.trainer.train"
        assert observed["trainer.args.max_seq_length"] == 64
        assert observed["trainer.args.iters"] == 4
        assert not any(str(tmp_path) in str(value) for value in observed.values())
        assert observed["optimizer.bias_correction"] is True
        assert observed["optimizer.class"] == "AdamW"
        assert observed["model.layers"] == 2
        assert observed["lora.rank"] == 4
        assert observed["lora.dropout"] == 0.05
        # The last of two layers is adapted, and the embedding is the head.
        names = set(values(trace, Phase.INIT, 0))
        assert {name.split(".")[2] for name in names if "lora_A" in name} == {"1"}
        row = trace.row(Phase.INIT, 0)
        assert row is not None
        head_entry = row.layout.entries[row.layout.positions["lm_head.weight"]]
        assert head_entry.alias_of == "init/model.embed_tokens.weight"


# What is recorded is what happened.


@pytest.mark.parametrize(
    "loop", ["compiled_norm", "eager_value", "made_before", "partly_compiled", "functional_direct", "nested"]
)
def test_grad_is_what_the_loop_itself_computed_before_clipping(run: Runner, loop: str) -> None:
    recorded = run("mlx_loops.py", loop, recorded=True)
    with traced(recorded) as trace:
        for step in trace.steps[1:]:
            grad = values(trace, Phase.GRAD, step)
            own = {name.partition("/")[2]: g for name, g in recorded.gradients.items() if name.startswith(f"{step}/")}
            assert {name for name in grad if not name.startswith("reported.")} == set(own)
            for name, gradient in own.items():
                assert np.array_equal(grad[name], gradient), (step, name)


def test_losses_and_micro_batches_are_those_of_the_loop(run: Runner) -> None:
    recorded = run("mlx_loops.py", "eager_value", recorded=True)
    with traced(recorded) as trace:
        losses = [
            float(values(trace, Phase.LOSS, step, m)["loss"]).hex()
            for step in trace.steps[1:]
            for m in trace.micro_batches(Phase.LOSS, step)
        ]
        assert losses == recorded.result["losses"]
        assert len(losses) == 8
        assert trace.observed["accumulation"] == 2
        assert trace.observed["compiled"] is False
        batch = values(trace, Phase.BATCH, 1, 0)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert batch["tokens"] == 13 == np.count_nonzero(batch["labels"] != -100)
    # The mask takes the last target of the first row away, the shift the first column.
    assert batch["labels"][0, -1] == -100
    assert (batch["labels"][:, 0] == -100).all()
    assert np.array_equal(batch["labels"][1, 1:], batch["input_ids"][1, 1:])


def test_clipping_by_norm_follows_from_the_recorded_gradients(run: Runner) -> None:
    with traced(run("mlx_loops.py", "compiled_norm", recorded=True)) as trace:
        assert trace.observed["clip.mode"] == "norm"
        assert trace.observed["clip.value"] == 0.05
        for step in trace.steps[1:]:
            grad = values(trace, Phase.GRAD, step)
            norm = grad.pop("reported.grad_norm")
            exact = np.sqrt(sum(float(np.sum(np.square(g.astype(np.float64)))) for g in grad.values()))
            assert abs(exact - norm) <= 4 * np.spacing(norm)
            assert exact > 0.05, "the loop must clip"
            clipped = values(trace, Phase.CLIPPED_GRAD, step)
            for name, g in grad.items():
                expected = g.astype(np.float64) * min(0.05 / (exact + 1e-6), 1.0)
                assert _within_ulp(clipped[name], expected, 4), (step, name)


def test_clipping_by_value_by_hand_is_seen_through_accumulation(run: Runner) -> None:
    with traced(run("mlx_loops.py", "eager_value", recorded=True)) as trace:
        assert trace.observed["clip.mode"] == "value"
        assert trace.observed["clip.value"] == 0.002
        for step in trace.steps[1:]:
            grad, clipped = values(trace, Phase.GRAD, step), values(trace, Phase.CLIPPED_GRAD, step)
            assert any((np.abs(g) > 0.002).any() for g in grad.values())
            for name, g in grad.items():
                assert np.array_equal(np.clip(g, np.float32(-0.002), np.float32(0.002)), clipped[name])


@pytest.mark.parametrize("program", [("mlx_loops.py", "compiled_norm"), ("mlx_loops.py", "eager_value"),
                                     ("mlx_lm_train.py", "float32", "3", "0.05")])  # fmt: skip
def test_adam_without_bias_correction_follows_from_the_recorded_gradients(
    run: Runner, program: tuple[str, ...]
) -> None:
    with traced(run(*program, recorded=True)) as trace:
        assert trace.observed["optimizer.bias_correction"] is False
        for step in trace.steps[1:]:
            assert not _adam_faults(trace, step, bias_correction=False)
            assert values(trace, Phase.OPT_STATE, step)["step"] == step


def test_the_wrong_rule_does_not_fit_the_same_records(run: Runner) -> None:
    with traced(run("mlx_loops.py", "compiled_norm", recorded=True)) as trace:
        assert all(_adam_faults(trace, step, bias_correction=True) for step in trace.steps[1:])
        assert all(_adam_faults(trace, step, bias_correction=False, lr_factor=1.0001) for step in trace.steps[1:])


def test_the_learning_rate_is_the_one_that_the_update_used(run: Runner) -> None:
    with traced(run("mlx_loops.py", "compiled_norm", recorded=True)) as trace:
        rates = [float(values(trace, Phase.HPARAMS, step)["group0.lr"]) for step in trace.steps[1:]]
    # linear_schedule(1e-2, 1e-3, 8): the first update is made at the first rate.
    assert np.allclose(rates, [1e-2 - 9e-3 * k / 8 for k in range(4)], rtol=1e-6)


def test_the_generator_is_recorded_as_each_step_begins(run: Runner) -> None:
    recorded = run("mlx_loops.py", "compiled_norm", recorded=True)
    with traced(recorded) as trace:
        keys = [values(trace, Phase.HPARAMS, step)["rng.mlx"].tolist() for step in trace.steps[1:]]
        assert values(trace, Phase.INIT, 0)["rng.mlx"].tolist() == keys[0]
    assert len({tuple(key) for key in [*keys, recorded.result["rng"]]}) == 5, "each step draws, so each key is another"


def test_mlx_lm_batches_are_what_default_loss_supervises(run: Runner) -> None:
    recorded = run("mlx_lm_train.py", "float32", "3", "0.05", recorded=True)
    rows = {tuple(row[:48]): (offset, min(len(row), 48)) for row, offset in recorded.result["rows"]}
    tokens = []
    with traced(recorded) as trace:
        assert trace.observed["accumulation"] == 3
        assert trace.observed["compiled"] is True
        for step in trace.steps[1:]:
            for m in trace.micro_batches(Phase.BATCH, step):
                batch = values(trace, Phase.BATCH, step, m)
                tokens.append(int(batch["tokens"]))
                for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
                    offset, length = next(rows[row] for row in rows if tuple(ids[: len(row)]) == row and len(row) > 2)
                    # Both ends are included: the position after the last token is a pad, and it is supervised.
                    expected = [t if max(offset, 1) <= i <= length else -100 for i, t in enumerate(ids)]
                    assert labels == expected
    assert np.cumsum(tokens).tolist() == recorded.result["tokens"]


def test_mlx_lm_gradients_are_the_mean_of_the_micro_batches_transposed_for_lora(run: Runner) -> None:
    checked = run("mlx_lm_train.py", "float32", "3", "0", "check", recorded=False)
    recorded = run("mlx_lm_train.py", "float32", "3", "0", recorded=True)
    assert recorded.result == checked.result
    with traced(recorded) as trace:
        grad = values(trace, Phase.GRAD, 1)
        assert set(grad) == {_canonical(name) for name in checked.gradients}
        for name, own in checked.gradients.items():
            assert grad[_canonical(name)].shape == own.T.shape
            assert np.linalg.norm(grad[_canonical(name)] - own.T) <= 1e-5 * np.linalg.norm(own)


def test_lora_factors_scale_and_frozen_weights_are_in_step_0(run: Runner) -> None:
    with traced(run("mlx_lm_train.py", "bfloat16", "3", "0.05", recorded=True)) as trace:
        found = values(trace, Phase.INIT, 0)
        name = "model.layers.1.self_attn.q_proj"
        assert found[f"{name}.lora_A.weight"].shape == (4, 32)
        assert found[f"{name}.lora_B.weight"].shape == (32, 4)
        assert found[f"{name}.lora_scale"] == 8.0
        row = trace.row(Phase.INIT, 0)
        assert row is not None
        frozen = {entry.name: entry for entry in row.layout.entries if not entry.stored}
        assert frozen[f"{name}.weight"].dtype == "bfloat16"
        assert "model.norm.weight" in frozen
        digests = {row.digests[row.layout.positions[name]].tobytes() for name in frozen}
        assert len(digests) >= len(frozen) - 4, "norm weights are all ones; everything else is its own"
        assert trace.observed["model.dtype"] == ["bfloat16", "float32"]
        assert trace.observed["model.class"] == "mlx_lm.models.llama.Model"


def test_optimizer_state_that_exists_before_recording_is_in_step_0(run: Runner) -> None:
    with traced(run("mlx_loops.py", "made_before", recorded=True)) as resumed:
        before = values(resumed, Phase.OPT_STATE, 0)
        assert np.any(before["up.weight/exp_avg"])
        assert [int(values(resumed, Phase.OPT_STATE, step)["step"]) for step in resumed.steps[1:]] == [2, 3, 4, 5]
        assert not any(_adam_faults(resumed, step, bias_correction=False) for step in resumed.steps[1:])
    with traced(run("mlx_loops.py", "compiled_norm", recorded=True)) as fresh:
        assert fresh.row(Phase.OPT_STATE, 0) is None


def test_each_optimizer_of_a_multi_optimizer_is_a_group(run: Runner) -> None:
    with traced(run("mlx_loops.py", "two_optimizers", recorded=True)) as trace:
        settings, state = values(trace, Phase.HPARAMS, 1), values(trace, Phase.OPT_STATE, 1)
        assert settings["group0.momentum"] == 0.9
        assert settings["group1.beta2"] == 0.999
        assert trace.observed["optimizer.groups"]["group0"] == ["embed_tokens.weight"]
        assert trace.observed["optimizer.class"] == ["SGD", "AdamW"]
        assert "embed_tokens.weight/momentum_buffer" in state
        assert "up.weight/exp_avg_sq" in state
        assert set(values(trace, Phase.PARAM, 1)) == {"embed_tokens.weight", "up.weight", "up.bias", "lm_head.weight"}


# What cannot be seen is said to be unrecorded.


def test_a_gradient_hidden_in_a_compiled_function_is_unrecorded_and_the_update_is_kept(run: Runner) -> None:
    hidden, seen = (run("mlx_loops.py", loop, recorded=True) for loop in ("functional", "functional_direct"))
    with traced(hidden) as trace, traced(seen) as twin:
        assert trace.steps == twin.steps == (0, 1, 2, 3, 4)
        assert "clip.mode" not in trace.observed
        assert twin.observed["clip.mode"] == "none"
        for step in trace.steps[1:]:
            assert set(states(trace, Phase.GRAD, step).values()) == {State.UNRECORDED}
            assert states(trace, Phase.LOSS, step, 0) == {"loss": State.UNRECORDED}
            assert states(twin, Phase.LOSS, step, 0) == {"loss": State.VALUE}
            applied, same = values(trace, Phase.CLIPPED_GRAD, step), values(twin, Phase.CLIPPED_GRAD, step)
            assert all(np.allclose(applied[name], same[name], rtol=1e-4, atol=1e-6) for name in same)
        assert set(values(trace, Phase.INIT, 0)) >= set(values(trace, Phase.PARAM, 1))


def test_gradients_taken_under_vmap_are_unrecorded_and_the_update_is_kept(run: Runner) -> None:
    with traced(run("mlx_loops.py", "per_example", recorded=True)) as trace:
        assert trace.steps == (0, 1, 2, 3, 4)
        for step in trace.steps[1:]:
            assert set(states(trace, Phase.GRAD, step).values()) == {State.UNRECORDED}
            assert states(trace, Phase.LOSS, step, 0) == {"loss": State.UNRECORDED}
            assert not _adam_faults(trace, step, bias_correction=False)


def test_an_update_that_cannot_be_seen_stops_the_recording_with_one_line(run: Runner) -> None:
    recorded = run("mlx_loops.py", "compiled_unseen", recorded=True)
    lines = [line for line in recorded.stderr.splitlines() if line.startswith("trace:")]
    assert len(lines) == 1
    assert "compiled without" in lines[0]


def _canonical(name: str) -> str:
    return name.replace("lora_a", "lora_A.weight").replace("lora_b", "lora_B.weight")


def _within_ulp(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], ulp: float) -> bool:
    """Whether float32 values are within so many units in the last place of float64 ones."""
    return bool(np.all(np.abs(actual - expected) <= ulp * np.spacing(np.abs(actual).astype(np.float32)) + 1e-38))


def _adam_faults(trace: Trace, step: int, *, bias_correction: bool, lr_factor: float = 1.0) -> list[str]:
    """Records of a step that do not follow from the recorded gradients by Adam in float64, to a few ULP."""
    settings = {name: float(v) for name, v in values(trace, Phase.HPARAMS, step).items() if v.ndim == 0}
    lr, eps, decay = settings["group0.lr"] * lr_factor, settings["group0.eps"], settings["group0.weight_decay"]
    b1, b2 = settings["group0.beta1"], settings["group0.beta2"]
    old = values(trace, Phase.OPT_STATE, step - 1) if trace.row(Phase.OPT_STATE, step - 1) else {}
    new, after = values(trace, Phase.OPT_STATE, step), values(trace, Phase.PARAM, step)
    before, faults = parameters_before(trace, step), []
    for name, gradient in values(trace, Phase.CLIPPED_GRAD, step).items():
        g, p = gradient.astype(np.float64), before[name].astype(np.float64)
        first = b1 * old.get(f"{name}/exp_avg", np.zeros_like(gradient)).astype(np.float64)
        second = b2 * old.get(f"{name}/exp_avg_sq", np.zeros_like(gradient)).astype(np.float64)
        m, v = first + (1 - b1) * g, second + (1 - b2) * g * g
        # A sum of opposite signs cancels: what counts is the last place of the larger term.
        room = np.spacing(np.maximum(np.abs(first), np.abs((1 - b1) * g)).astype(np.float32))
        if not np.all(np.abs(new[f"{name}/exp_avg"] - m) <= 4 * room):
            faults.append(f"{name}/exp_avg")
        if not _within_ulp(new[f"{name}/exp_avg_sq"], v, 8):
            faults.append(f"{name}/exp_avg_sq")
        m, v = new[f"{name}/exp_avg"].astype(np.float64), new[f"{name}/exp_avg_sq"].astype(np.float64)
        if bias_correction:
            m, v = m / (1 - b1**step), v / (1 - b2**step)
        update = lr * m / (np.sqrt(v) + eps)
        room = np.spacing(np.maximum(np.abs(p), np.abs(update)).astype(np.float32))
        if not np.all(np.abs(after[name] - (p * (1 - lr * decay) - update)) <= 4 * room):
            faults.append(name)
    return faults
