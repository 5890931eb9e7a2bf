"""Each kind of finding is planted and found at its address; the same run with rounding noise only is `same`."""

from __future__ import annotations

from typing import Any

import pytest

from differ import DiffOptions, DiffResult, Verdict
from differ.result import Kind
from tests.builders import FAULTS
from tests.differ.conftest import Compare
from tracer.schema import Phase

A0 = "model.layers.0.self_attn.q_proj.lora_A.weight"
A1 = "model.layers.1.self_attn.q_proj.lora_A.weight"
B1 = "model.layers.1.self_attn.q_proj.lora_B.weight"

# fault -> step, phase, micro-batch, name (None: not fixed), kind of the first finding, findings in all (None: not fixed)
EXPECTED: dict[str, tuple[int, str, int | None, str | None, Kind, int | None]] = {
    "lr": (1, "hparams", None, "group0.lr", Kind.VALUE, 1),
    "weight_decay": (1, "hparams", None, "group0.weight_decay", Kind.VALUE, 1),
    "bias_correction": (1, "param", None, None, Kind.VALUE, 1),
    "no_decay": (1, "param", None, None, Kind.VALUE, 1),
    "coupled_decay": (1, "opt_state", None, None, Kind.VALUE, 1),
    "eps_inside": (1, "param", None, None, Kind.VALUE, 1),
    "eps_before": (2, "param", None, None, Kind.VALUE, 1),
    "clip_value": (1, "clipped_grad", None, None, Kind.VALUE, 1),
    "clip_norm": (1, "clipped_grad", None, None, Kind.VALUE, 1),
    "clip_tensor": (1, "clipped_grad", None, None, Kind.VALUE, 1),
    "clip_unknown": (1, "clipped_grad", None, None, Kind.VALUE, 3),
    "init_draw": (0, "init", None, None, Kind.VALUE, 3),
    "init_names": (0, "init", None, A0, Kind.MISSING_B, 2),
    "init_frozen": (0, "init", None, "model.layers.1.self_attn.q_proj.weight", Kind.VALUE, 1),
    "init_cast": (0, "init", None, "model.embed_tokens.weight", Kind.VALUE, 4),
    "lora_scale": (0, "init", None, "model.layers.0.self_attn.q_proj.lora_scale", Kind.VALUE, 3),
    "batch_order": (1, "batch", 0, "input_ids", Kind.VALUE, 2),
    "label_masked": (2, "batch", 1, "labels", Kind.VALUE, 1),
    "batch_wider": (2, "batch", 0, "input_ids", Kind.SHAPE, 1),
    "micro_batches": (1, "batch", 2, None, Kind.MISSING_A, None),
    "loss_factor": (1, "loss", 0, "loss", Kind.VALUE, 1),
    "grad_factor": (1, "grad", None, None, Kind.VALUE, 3),
    "grad_none": (2, "grad", None, B1, Kind.STATE, 1),
    "grad_zero": (2, "grad", None, B1, Kind.VALUE, 1),
    "grad_element": (2, "grad", None, B1, Kind.VALUE, 1),
    "grad_nan": (2, "grad", None, B1, Kind.NONFINITE, 1),
    "grad_inf": (2, "grad", None, B1, Kind.NONFINITE, 1),
    "grad_shape": (2, "grad", None, B1, Kind.SHAPE, None),
    "grad_missing": (2, "grad", None, B1, Kind.MISSING_B, 1),
    "grad_row": (2, "grad", None, None, Kind.MISSING_B, 2),
    "moment": (2, "opt_state", None, f"{B1}/exp_avg_sq", Kind.VALUE, None),
    "counter": (2, "opt_state", None, "step", Kind.VALUE, None),
    "param_element": (2, "param", None, B1, Kind.VALUE, 1),
    "param_stuck": (2, "param", None, B1, Kind.VALUE, 1),
    "eval": (2, "eval", None, "score", Kind.VALUE, 1),
    "step_missing": (2, "hparams", None, None, Kind.MISSING_B, 1),
    "steps_fewer": (3, "hparams", None, None, Kind.MISSING_B, 1),
}
# Faults that are no divergence: within one unit in the last place, not recorded, cut off, or of another optimizer.
HARMLESS = {"init_ulp", "grad_unrecorded", "unfinished", "nesterov"}


def test_every_fault_has_an_expectation() -> None:
    assert set(EXPECTED) | HARMLESS == set(FAULTS)


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_planted_fault_is_found_at_its_address(fault: str, compare: Compare) -> None:
    step, phase, micro_batch, name, kind, findings = EXPECTED[fault]

    result = compare(fault)

    assert result.verdict is Verdict.DIVERGED
    assert result.first is not None
    assert (result.first.step, result.first.phase, result.first.micro_batch) == (step, phase, micro_batch)
    assert result.first.kind == kind
    if name is not None:
        assert result.first.name == name
    if findings is not None:
        assert len(result.findings) == findings, [(f.step, f.phase, f.name) for f in result.findings]


@pytest.mark.parametrize("fault", [None, *sorted(HARMLESS)])
def test_noise_and_harmless_differences_are_the_same(fault: str | None, compare: Compare) -> None:
    result = compare(fault)

    assert result.verdict is Verdict.SAME, result.first
    assert 0.0 < result.margin < 1.0
    assert result.counts.within > 0


def test_the_value_that_differs_is_shown_with_its_index(compare: Compare) -> None:
    result = compare("grad_element")

    assert result.first is not None
    assert result.first.index == (1, 1)
    assert result.first.b == 0.25
    assert result.first.required is not None
    assert result.first.tolerance is not None
    assert result.first.required > result.first.tolerance


def test_a_trace_without_its_twin_s_phase_is_compared_in_the_others(compare: Compare) -> None:
    without = frozenset(Phase) - {Phase.GRAD, Phase.CLIPPED_GRAD}

    result = compare(b={"what": without})

    assert result.verdict is Verdict.SAME
    assert result.counts.unrecorded > 0
    assert any("grad is recorded in a only" in note.summary for note in result.notes)


def test_traces_with_nothing_in_common_are_incomparable(compare: Compare) -> None:
    result = compare(a={"what": frozenset({Phase.INIT})}, b={"what": frozenset({Phase.GRAD})})

    assert result.verdict is Verdict.INCOMPARABLE
    assert result.counts.compared == 0
    assert said_of_nothing(result).startswith("a and b have no record in common: a has steps 0 to ")
    assert said_of_nothing(result).endswith(", grad")


def said_of_nothing(result: DiffResult) -> str:
    (note,) = [note for note in result.notes if note.id == "nothing"]
    return note.summary


def test_leaving_everything_out_is_incomparable_and_never_same(compare: Compare) -> None:
    result = compare(options=DiffOptions(only=("no.such.name",)))

    assert result.verdict is Verdict.INCOMPARABLE
    assert said_of_nothing(result).startswith(
        "no record that both have is left by --only no.such.name: both have steps"
    )
    said = said_of_nothing(compare(options=DiffOptions(steps=(90, 99), phases=frozenset({Phase.GRAD}))))
    assert said.startswith("no record that both have is left by --phases grad --steps 90:99: ")
    assert not [note for note in compare().notes if note.id == "nothing"]


def test_a_missing_name_comes_with_the_nearest_candidate(compare: Compare) -> None:
    result = compare(b={"names": lambda name: name.replace("q_proj", "qq_proj")})

    assert result.first is not None
    missing = {finding.name: finding for finding in result.findings if finding.phase == "init"}
    assert missing[A1].kind is Kind.MISSING_B
    assert missing[A1].nearest[0] == A1.replace("q_proj", "qq_proj")
    assert result.findings[0].step == 0


def test_names_missing_at_init_are_no_news_in_later_phases(compare: Compare) -> None:
    result = compare("init_names")

    assert {(finding.step, finding.phase) for finding in result.findings} == {(0, "init")}
    assert result.counts.propagated > 0


def test_an_unfinished_trace_is_compared_as_far_as_it_goes(compare: Compare) -> None:
    result = compare("unfinished")

    assert result.verdict is Verdict.SAME
    assert result.counts.steps == 2
    assert result.counts.unrecorded > 0
    assert any(note.summary.startswith("b is unfinished: ends after step 2") for note in result.notes)


def test_an_unfinished_trace_that_diverged_is_diverged(compare: Compare) -> None:
    result = compare("grad_element", b={"finished": False})

    assert result.verdict is Verdict.DIVERGED


def test_three_independent_causes_come_out_of_one_diff(compare: Compare) -> None:
    result = compare("init_names", b={"clip": "value", "clip_value": 0.01, "bias_correction": False})

    found = {(finding.step, finding.phase) for finding in result.findings}
    assert found == {(0, "init"), (1, "clipped_grad"), (1, "param")}


def test_different_adapters_propagate_to_the_model_and_leave_the_optimizer_judged(compare: Compare) -> None:
    clean = compare("init_draw")
    assert {finding.phase for finding in clean.findings} == {"init"}

    faulty = compare("init_draw", b={"bias_correction": False})
    assert {finding.phase for finding in faulty.findings} == {"init", "param"}


def test_a_parameter_that_leaves_its_own_rule_is_found_after_the_runs_have_parted(compare: Compare) -> None:
    result = compare("param_stuck", b={"init_seed": 99})

    last = result.findings[-1]
    assert (last.step, last.phase, last.name) == (2, "param", B1)
    assert "b does not follow from its own inputs" in last.detail


def test_first_is_the_first_of_the_findings(compare: Compare) -> None:
    result = compare("init_names", b={"clip": "value", "clip_value": 0.01})

    order = [(finding.step, Phase.parse(finding.phase)) for finding in result.findings]
    assert result.first is result.findings[0]
    assert order == sorted(order)


def test_a_record_that_is_optional_in_a_batch_is_not_a_finding(compare: Compare) -> None:
    import numpy as np

    from tests.builders import record

    def add_mask(row: Any) -> Any:
        if row.phase is not Phase.BATCH:
            return row
        from dataclasses import replace

        return replace(row, records=(*row.records, record("attention_mask", np.ones((2, 6), np.int64))))

    result = compare(b={"edit": add_mask})

    assert result.verdict is Verdict.SAME
    assert result.counts.unrecorded == 6


def test_integers_of_another_width_are_compared_by_value(compare: Compare) -> None:
    from dataclasses import replace

    def narrow(row: Any) -> Any:
        if row.phase is not Phase.BATCH:
            return row
        records = [replace(r, data=r.data.astype("int32"), dtype="int32") for r in row.records]
        return replace(row, records=tuple(records))

    assert compare(b={"edit": narrow}).verdict is Verdict.SAME
    assert compare("label_masked").verdict is Verdict.DIVERGED


def test_hyper_parameters_held_in_float32_agree_with_float64(compare: Compare) -> None:
    import numpy as np

    result = compare(b={"lr": float(np.float32(1e-2)), "beta2": float(np.float32(0.999))})

    assert result.verdict is Verdict.SAME, result.first
