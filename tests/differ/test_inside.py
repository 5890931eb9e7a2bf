"""What is recorded inside a step and a micro-batch is compared where both sides have it: outputs by position, losses by token,
gradients by micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from differ import DiffOptions, DiffResult, Verdict, diff
from differ.policy import load_policy
from tests.builders import F32, IGNORED, record
from tracer.reader import open_trace
from tracer.schema import POSITIONS, TOKEN_LOSS, WHOLE_STEP, Phase, Record, Row, State
from tracer.shrink import shrink
from tracer.writer import TraceWriter

WIDTH, ROWS, LENGTH = 16, 2, 6
MODULES = ("model.embed_tokens", "model.layers.0.mlp", "model.layers.1.mlp", "lm_head")
EVERYWHERE = np.argwhere(np.ones((ROWS, LENGTH)))
OUTPUTS = {
    name: np.random.default_rng(i).normal(size=(ROWS, LENGTH, WIDTH)).astype(F32) for i, name in enumerate(MODULES)
}

Array = np.ndarray
Outputs = Mapping[str, Array]


def forward(outputs: Outputs, positions: Array = EVERYWHERE, micro_batch: int = 0) -> Row:
    """Outputs [B, L, features] as they are recorded at some positions."""
    rows = [record(name, output[positions[:, 0], positions[:, 1]]) for name, output in outputs.items()]
    return Row(Phase.FORWARD, 1, micro_batch, (record(POSITIONS, positions), *rows))


def losses(tokens: Array, loss: float, micro_batch: int = 0) -> list[Row]:
    labels = np.where(tokens == 0, IGNORED, 3)
    batch = (record("labels", labels), record("tokens", np.int64(np.count_nonzero(tokens))))
    return [
        Row(Phase.BATCH, 1, micro_batch, batch),
        Row(Phase.LOSS, 1, micro_batch, (record(TOKEN_LOSS, tokens.astype(F32)), record("loss", F32(loss)))),
    ]


def grads(values: float, micro_batch: int = WHOLE_STEP) -> Row:
    return Row(Phase.GRAD, 1, micro_batch, (record("w", np.linspace(1, 2, 8).astype(F32) * F32(values)),))


def write(path: Path, rows: Sequence[Row]) -> Path:
    writer = TraceWriter(path, env={}, declared={}, overwrite=True)
    start = record("w", np.ones(8, F32))
    writer.write_step(0, [Row(Phase.INIT, 0, WHOLE_STEP, (start,))], {"model.dtype": "float32"})
    writer.write_step(1, rows)
    writer.finish()
    return path


def compare(folder: Path, a: Sequence[Row], b: Sequence[Row]) -> DiffResult:
    return diff(write(folder / "a.h5", a), write(folder / "b.h5", b))


def changed(name: str, row: int, position: int, by: float = 0.5) -> dict[str, Array]:
    """The outputs with one place of one module changed."""
    output = OUTPUTS[name].copy()
    output[row, position, 3] += F32(by)
    return {**OUTPUTS, name: output}


# Module outputs.


@pytest.mark.parametrize(
    "kept", [EVERYWHERE[2:9], EVERYWHERE[::2], EVERYWHERE[::-1][:7]], ids=["fewer", "thinned", "turned"]
)
def test_outputs_are_compared_at_the_positions_that_both_sides_have(tmp_path: Path, kept: Array) -> None:
    result = compare(tmp_path, [forward(OUTPUTS)], [forward(OUTPUTS, kept)])
    assert result.verdict is Verdict.SAME
    assert result.counts.compared == 1 + len(MODULES)
    (note,) = [note for note in result.notes if note.id == "forward.positions"]
    assert f"{len(kept)} positions" in note.summary
    row, position = kept[3]
    fault = compare(tmp_path, [forward(OUTPUTS)], [forward(changed(MODULES[1], row, position), kept)])
    assert fault.first is not None
    assert (fault.first.phase, fault.first.name) == ("forward", MODULES[1])
    assert fault.first.detail == f"row {row} of the batch, position {position}"


def test_what_is_wrong_at_positions_of_one_side_only_cannot_be_seen(tmp_path: Path) -> None:
    result = compare(tmp_path, [forward(OUTPUTS)], [forward(changed(MODULES[1], 1, 5), EVERYWHERE[:6])])
    assert result.verdict is Verdict.SAME


def test_the_first_module_in_call_order_is_the_finding_and_later_ones_follow(tmp_path: Path) -> None:
    wrong = {name: output + F32(0.01 * (i > 0)) for i, (name, output) in enumerate(OUTPUTS.items())}
    for outputs in (wrong, dict(reversed(wrong.items()))):
        result = compare(tmp_path, [forward(OUTPUTS)], [forward(outputs)])
        assert [found.name for found in result.findings] == [MODULES[1]]
        assert result.counts.propagated == 2


def test_modules_of_one_side_are_a_note(tmp_path: Path) -> None:
    more = {**OUTPUTS, "model.extra": OUTPUTS[MODULES[0]]}
    result = compare(tmp_path, [forward(OUTPUTS)], [forward(more)])
    assert result.verdict is Verdict.SAME
    (note,) = [note for note in result.notes if note.id == "forward.modules"]
    assert (note.side, note.names) == ("b", ("model.extra",))


def test_outputs_without_a_common_position_are_not_called_the_same(tmp_path: Path) -> None:
    result = compare(tmp_path, [forward(OUTPUTS, EVERYWHERE[:5])], [forward(changed(MODULES[0], 1, 1), EVERYWHERE[5:])])
    (note,) = [note for note in result.notes if note.id == "forward.positions"]
    assert "no position in common" in note.summary
    assert result.counts.compared == 1


def test_whole_outputs_without_positions_are_compared_as_they_are(tmp_path: Path) -> None:
    def whole(outputs: Outputs) -> Row:
        return Row(Phase.FORWARD, 1, 0, tuple(record(name, output) for name, output in outputs.items()))

    assert compare(tmp_path, [whole(OUTPUTS)], [whole(OUTPUTS)]).verdict is Verdict.SAME
    result = compare(tmp_path, [whole(OUTPUTS)], [whole(changed(MODULES[1], 0, 2))])
    assert [found.name for found in result.findings] == [MODULES[1]]
    half = compare(tmp_path, [whole(OUTPUTS)], [forward(OUTPUTS)])
    assert "does not say which positions" in next(n.summary for n in half.notes if n.id == "forward.positions")


@pytest.mark.parametrize(("by", "verdict"), [(1e-6, Verdict.SAME), (1e-3, Verdict.DIVERGED)])
def test_what_lora_adds_is_judged_with_the_noise_of_the_output_that_it_is_a_part_of(
    tmp_path: Path, by: float, verdict: Verdict
) -> None:
    draw = np.random.default_rng(0)
    base, delta = (draw.normal(size=(ROWS, LENGTH, WIDTH)).astype(F32) * F32(size) for size in (1.0, 1e-3))
    noise = draw.normal(size=delta.shape).astype(F32) * F32(by)
    name = "model.layers.0.self_attn.q_proj"

    def outputs(added: Array) -> Outputs:
        return {f"{name}.base_layer": base, f"{name}.lora_delta": added, name: (base + delta).astype(F32)}

    for kept in (EVERYWHERE, EVERYWHERE[1:]):
        result = compare(tmp_path, [forward(outputs(delta))], [forward(outputs(delta + noise), kept)])
        assert result.verdict is verdict
        assert [found.name for found in result.findings] == [f"{name}.lora_delta"] * (verdict is Verdict.DIVERGED)


def test_sketches_of_outputs_are_judged_where_the_positions_are_the_same(tmp_path: Path) -> None:
    wide = {name: np.tile(output, 8) for name, output in OUTPUTS.items()}
    wrong = {name: output + F32(0.1 * (name == MODULES[2])) for name, output in wide.items()}
    small, long = tmp_path / "small.h5", np.repeat(EVERYWHERE, 60, axis=0)
    with open_trace(write(tmp_path / "a.h5", [forward(wide, long)])) as trace:
        shrink(trace, tmp_path / "long.h5")
    found = diff(tmp_path / "long.h5", write(tmp_path / "b.h5", [forward(wrong, long)])).findings
    assert [finding.name for finding in found] == [MODULES[2]]
    with open_trace(write(tmp_path / "a.h5", [forward(wide)])) as trace:
        shrink(trace, small)
    assert [f.name for f in diff(small, write(tmp_path / "b.h5", [forward(wrong)])).findings] == [MODULES[2]]
    other = diff(small, write(tmp_path / "b.h5", [forward(wrong, EVERYWHERE[1:])]))
    assert other.verdict is Verdict.SAME
    assert other.counts.unrecorded >= len(MODULES)


# Losses of tokens.

TOKENS = np.array([[0, 1.5, 2.5, 0.5, 3.0, 0], [0, 2.0, 0, 1.0, 4.0, 2.5]])
MEAN, COUNT = TOKENS.sum() / np.count_nonzero(TOKENS), np.count_nonzero(TOKENS)


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("factor", [1 + 1e-5, 0.98, 3.0])
def test_a_loss_that_does_not_follow_from_its_tokens_is_found_on_its_side(
    tmp_path: Path, side: str, factor: float
) -> None:
    pair = [losses(TOKENS, MEAN), losses(TOKENS, MEAN * factor)]
    result = compare(tmp_path, *(pair if side == "b" else pair[::-1]))
    (finding,) = result.findings
    assert (finding.phase, finding.name) == ("loss", "loss")
    assert f"{side}'s loss does not follow from its token losses" in finding.detail
    assert finding.required is not None
    assert finding.tolerance is not None
    assert finding.required > finding.tolerance


@pytest.mark.parametrize(
    ("denominator", "words"),
    [
        (1, "sum"),
        (TOKENS.size, "mean over all positions"),
        (ROWS * (LENGTH - 1), "predicted positions"),
        (ROWS, "the rows"),
    ],
)
def test_another_known_reduction_is_found_and_said(tmp_path: Path, denominator: float, words: str) -> None:
    result = compare(tmp_path, losses(TOKENS, MEAN), losses(TOKENS, TOKENS.sum() / denominator))
    (finding,) = result.findings
    assert (finding.phase, finding.name) == ("loss", "loss")
    assert finding.detail.startswith("a's loss is its token losses' mean; b's loss is its token losses' ")
    assert words in finding.detail


def test_losses_under_the_same_reduction_agree_whatever_it_is(tmp_path: Path) -> None:
    noisy = TOKENS * (1 + 1e-7)
    for reduced in (MEAN, TOKENS.sum(), TOKENS.sum() / TOKENS.size):
        assert compare(tmp_path, losses(TOKENS, reduced), losses(noisy, reduced * (1 + 1e-7))).verdict is Verdict.SAME


def test_two_losses_under_no_known_reduction_are_compared_with_each_other(tmp_path: Path) -> None:
    same = compare(tmp_path, losses(TOKENS, MEAN * 0.9), losses(TOKENS, MEAN * 0.9 * (1 + 2e-7)))
    assert same.verdict is Verdict.SAME
    assert {note.side for note in same.notes if note.id == "rule.unknown"} == {"a", "b"}
    other = compare(tmp_path, losses(TOKENS, MEAN * 0.9), losses(TOKENS, MEAN * 0.8))
    assert [found.name for found in other.findings] == ["loss"]


def test_a_token_that_only_one_side_supervises_is_named_by_its_place(tmp_path: Path) -> None:
    a, b = losses(TOKENS, MEAN), losses(np.where(TOKENS == 3.0, 0, TOKENS), 1.0)
    result = compare(tmp_path, a[1:], b[1:])
    (finding,) = result.findings
    assert (finding.phase, finding.name) == ("loss", TOKEN_LOSS)
    assert finding.detail == "1 tokens have a loss on one side only: (0, 4) (row, position)"
    assert result.counts.propagated == 1


def test_losses_of_tokens_on_one_side_only_are_no_finding(tmp_path: Path) -> None:
    without = [
        replace(row, records=row.records[1:]) if row.phase is Phase.LOSS else row for row in losses(TOKENS, MEAN)
    ]
    unseen = Record(TOKEN_LOSS, None, "float32", (ROWS, LENGTH), state=State.UNRECORDED)
    unrecorded = [replace(row, records=(unseen, *row.records)) if row.phase is Phase.LOSS else row for row in without]
    for rows in (without, unrecorded):
        assert compare(tmp_path, losses(TOKENS, MEAN), rows).verdict is Verdict.SAME


def test_a_user_s_own_rule_decides_on_a_loss_that_its_token_losses_do_not_give(tmp_path: Path) -> None:
    loose = tmp_path / "loose.toml"
    loose.write_text('[[rule]]\nphase = "loss"\nbase = 0.2\n')
    a = write(tmp_path / "a.h5", losses(TOKENS, MEAN))

    for factor, verdict in ((1.1, Verdict.SAME), (1.5, Verdict.DIVERGED)):
        b = write(tmp_path / "b.h5", losses(TOKENS, MEAN * factor))
        assert diff(a, b).verdict is Verdict.DIVERGED
        assert diff(a, b, DiffOptions(policy=load_policy(loose))).verdict is verdict


# Gradients of micro-batches.


def test_a_micro_batch_whose_gradient_differs_comes_before_what_is_accumulated(tmp_path: Path) -> None:
    result = compare(tmp_path, [grads(1, 0), grads(1, 1), grads(2)], [grads(1, 0), grads(1.01, 1), grads(2.01)])
    (finding,) = result.findings
    assert (finding.phase, finding.micro_batch, finding.name) == ("grad", 1, "w")
    assert result.counts.propagated == 1


def test_gradients_of_micro_batches_on_one_side_only_are_no_finding(tmp_path: Path) -> None:
    result = compare(tmp_path, [grads(1, 0), grads(1, 1), grads(2)], [grads(2)])
    assert (result.verdict, result.counts.unrecorded) == (Verdict.SAME, 2)


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, Verdict.SAME), (1.01, Verdict.DIVERGED)])
def test_gradients_of_losses_under_two_reductions_are_compared_without_their_weights(
    tmp_path: Path, factor: float, verdict: Verdict
) -> None:
    counts, total = (7, 3), 10
    tokens = [np.where(np.arange(LENGTH * ROWS).reshape(ROWS, LENGTH) < n, 2.0 + n, 0.0) for n in counts]
    means = [2.0 + n for n in counts]
    a = [row for m in (0, 1) for row in losses(tokens[m], means[m], m)]
    b = [row for m in (0, 1) for row in losses(tokens[m], means[m] * counts[m] / total, m)]
    own = [1.0, 3.0]
    a += [*(grads(own[m], m) for m in (0, 1)), grads(1.6)]
    b += [*(grads(own[m] * counts[m] / total * (factor if m else 1.0), m) for m in (0, 1)), grads(1.6)]
    result = compare(tmp_path, a, b)
    assert result.verdict is verdict
    assert [found.micro_batch for found in result.findings] == [1] * (verdict is Verdict.DIVERGED)
    assert [note.id for note in result.notes if note.id == "loss.weighted"]


@pytest.mark.parametrize("shape", [(), (3, 4), (0, 4), (len(EVERYWHERE), 2, 3), (len(EVERYWHERE), 0)], ids=str)
@pytest.mark.parametrize("kept", [EVERYWHERE, EVERYWHERE[:7]], ids=["all", "some"])
def test_outputs_that_have_not_one_row_a_position_are_compared_as_they_are(
    tmp_path: Path, shape: tuple[int, ...], kept: Array
) -> None:
    def odd(value: float, positions: Array) -> Row:
        of = (len(positions), *shape[1:]) if shape[:1] == (len(EVERYWHERE),) else shape
        return Row(Phase.FORWARD, 1, 0, (record(POSITIONS, positions), record("odd", np.full(of, value, F32))))

    result = compare(tmp_path, [odd(1, EVERYWHERE)], [odd(2, kept)])

    assert [found.name for found in result.findings] == ["odd"] * bool(np.prod(shape))
    assert compare(tmp_path, [odd(1, EVERYWHERE)], [odd(1, kept)]).verdict is Verdict.SAME


def test_outputs_can_be_left_out_by_name(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.h5", [forward(OUTPUTS)]), write(tmp_path / "b.h5", [forward(changed(MODULES[1], 0, 1))])
    assert diff(a, b, DiffOptions(omit=("model.layers.*",))).verdict is Verdict.SAME
