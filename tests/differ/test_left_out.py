"""`--phases`: what is left out of the judgement is named, explains nothing, and never makes what it moved the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from differ import DiffOptions, DiffResult, Verdict, diff
from differ.reporters import Style
from differ.reporters.junit import render as junit
from differ.reporters.text import render
from differ.result import Kind
from tests.builders import make_trace
from tests.differ.conftest import NOISE, Compare
from tracer.schema import Phase
from tracer.shrink import shrink_in_place

# Fault, the phase that is judged, and where it diverges there: what moved it is in a phase that is left out.
MOVED = [
    ("lr", Phase.PARAM, 1),
    ("lr", Phase.GRAD, 2),
    ("lr", Phase.LOSS, 2),
    ("lr", Phase.EVAL, 2),
    ("bias_correction", Phase.LOSS, 2),
    ("coupled_decay", Phase.PARAM, 1),
    ("clip_value", Phase.OPT_STATE, 1),
    ("clip_value", Phase.PARAM, 2),
    ("init_draw", Phase.GRAD, 1),
    ("init_draw", Phase.PARAM, 1),
    ("init_names", Phase.PARAM, 1),
    ("batch_order", Phase.LOSS, 1),
    ("batch_order", Phase.PARAM, 1),
    ("micro_batches", Phase.LOSS, 1),
    ("loss_factor", Phase.GRAD, 1),
    ("grad_factor", Phase.CLIPPED_GRAD, 1),
    ("grad_factor", Phase.OPT_STATE, 1),
    ("grad_element", Phase.PARAM, 2),
    ("grad_nan", Phase.PARAM, 2),
    ("param_stuck", Phase.LOSS, 3),
    ("step_missing", Phase.PARAM, 2),
    ("steps_fewer", Phase.GRAD, 3),
]
JUDGED = (
    Phase.INIT,
    Phase.HPARAMS,
    Phase.BATCH,
    Phase.LOSS,
    Phase.GRAD,
    Phase.CLIPPED_GRAD,
    Phase.OPT_STATE,
    Phase.PARAM,
)


def only(*phases: Phase) -> DiffOptions:
    return DiffOptions(phases=frozenset(phases))


def note(result: DiffResult) -> str:
    (found,) = [cause.summary for cause in result.notes if cause.id == "phases.left_out"]
    assert result.notes[0].summary == found
    return found


@pytest.mark.parametrize(("fault", "phase", "step"), MOVED, ids=[f"{f}-{p.label}" for f, p, _ in MOVED])
def test_what_was_moved_by_a_phase_that_is_left_out_is_not_the_same(
    compare: Compare, tmp_path: Path, fault: str, phase: Phase, step: int
) -> None:
    result = compare(fault, options=only(phase))
    assert result.verdict is Verdict.DIVERGED
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (step, phase.label)
    assert {finding.phase for finding in result.findings} == {phase.label}
    counts = result.counts
    on_both = [f for f in result.findings if f.kind not in (Kind.MISSING_A, Kind.MISSING_B)]
    assert counts.compared == counts.same_bits + counts.within + len(on_both)
    back = diff(tmp_path / "b.h5", tmp_path / "a.h5", only(phase))
    assert (back.verdict, back.counts) == (result.verdict, counts)
    assert back.first is not None
    assert (back.first.step, back.first.name) == (step, result.first.name)


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("lr", Phase.BATCH),
        ("grad_factor", Phase.PARAM),
        ("eps_before", Phase.GRAD),
        ("param_element", Phase.GRAD),
        ("label_masked", Phase.LOSS),
    ],
)
def test_what_it_did_not_move_is_the_same_and_where_the_rest_diverges_is_said(
    compare: Compare, fault: str, phase: Phase
) -> None:
    result = compare(fault, options=only(phase))
    assert result.verdict is Verdict.SAME, result.findings
    whole = compare(fault)
    assert whole.first is not None
    assert f"where a and b diverge: step {whole.first.step}, {whole.first.phase}, {whole.first.name}" in note(result)


@pytest.mark.parametrize("phase", JUDGED, ids=[phase.label for phase in JUDGED])
def test_rounding_noise_is_no_divergence_of_any_phase_alone(compare: Compare, phase: Phase) -> None:
    result = compare(options=only(phase), steps=6)
    assert result.verdict is Verdict.SAME, result.findings
    assert note(result).startswith(f"judged: {phase.label}; left out: ")
    assert "diverge" not in note(result)


def test_a_setting_that_differs_by_next_to_nothing_and_is_left_out_leaves_the_rest_the_same(compare: Compare) -> None:
    for phase in (Phase.PARAM, Phase.LOSS, Phase.GRAD):
        result = compare(b={"lr": 1e-2 * (1 + 5e-6)}, options=only(phase), steps=6)
        assert result.verdict is Verdict.SAME, result.findings
        assert "diverge: step 1, hparams, group0.lr" in note(result)


def test_small_updates_of_large_parameters_are_measured_by_what_training_moved(compare: Compare) -> None:
    result = compare("lr", options=only(Phase.PARAM), lr=1e-5)
    assert result.first is not None
    assert result.first.phase == "param"
    # 1 % of the learning rate, far below the tolerance of the parameters themselves.
    assert result.first.required == pytest.approx(0.01, rel=0.2)
    assert "of what training moved it by" in result.first.detail
    assert compare(options=only(Phase.PARAM), lr=1e-5).verdict is Verdict.SAME


def test_a_rule_of_the_user_decides_about_parameters_that_were_moved(compare: Compare, tmp_path: Path) -> None:
    from differ.policy import load_policy

    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nphase = "param"\nbase = 0.05\n')
    options = DiffOptions(phases=frozenset({Phase.PARAM}), policy=load_policy(policy))
    assert compare("lr", options=options).verdict is Verdict.SAME
    assert compare("init_draw", options=options).verdict is Verdict.DIVERGED


def test_a_divergence_that_is_judged_explains_what_comes_of_it(compare: Compare) -> None:
    result = compare("lr", options=only(Phase.HPARAMS, Phase.PARAM, Phase.LOSS))
    assert [finding.phase for finding in result.findings] == ["hparams"]
    whole = compare("lr", options=only(*Phase))
    assert whole.findings == compare("lr").findings
    assert not [cause for cause in whole.notes if cause.id == "phases.left_out"]


def test_a_fingerprint_is_judged_in_the_same_way(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", fault="lr", noise=NOISE)
    shrink_in_place(b)
    result = diff(a, b, only(Phase.LOSS))
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (2, "loss")
    assert diff(a, b, only(Phase.PARAM)).verdict is Verdict.DIVERGED
    assert diff(a, b, only(Phase.BATCH)).verdict is Verdict.SAME


def test_the_report_names_what_was_left_out(compare: Compare) -> None:
    text = render(compare("lr", options=only(Phase.PARAM)), Style(width=120))
    assert text.startswith("DIVERGED at step 1, param, ")
    said = " ".join(text.split())
    assert (
        "judged: param; left out: init, hparams, batch, loss, grad, clipped_grad, opt_state, eval, where a and b"
        in said
    )
    assert "diverge: step 1, hparams, group0.lr" in said
    assert "judged: batch; left out: init, hparams" in junit(compare("lr", options=only(Phase.BATCH)), Style())
