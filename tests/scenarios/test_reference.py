"""The reference in torch: traces of both frameworks follow it, and a planted fault is named with its side and address.

The faults are planted in the recorded numbers of a real MLX run, so that nothing else about the trace changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from differ import DiffOptions, DiffResult, Verdict, diff
from differ.policy import default_policy
from differ.reference import Measured, NoReference, References, ReferenceSide, judge
from differ.reporters import Style, reporter
from scenarios.models import tiny_folder
from scenarios.reference import rules
from scenarios.reference.recorded import Recorded
from tests.scenarios.conftest import Once, arm, needs_mlx, needs_torch, record_all
from tracer.reader import RowView, open_trace
from tracer.schema import Fingerprint, Phase, Record, Row, State
from tracer.writer import TraceWriter

ROOT = Path(__file__).parents[2]
STEPS = 3
MIDDLE = "model.layers.2.mlp.up_proj.lora_B.weight"
pytestmark = [needs_torch, needs_mlx]

Edit = Callable[[Row], Row | None]


# Traces, and copies of them with a fault.


@pytest.fixture(scope="session")
def recorded(once: Once) -> dict[str, Path]:
    """Recorded runs: PyTorch, MLX and HF's Trainer from the same adapters and batches, and some that stand alone."""
    return {name: Path(file) for name, file in once("reference-runs", _record)[1].items()}


def _record(folder: Path) -> dict[str, str]:
    base = {"train.steps": STEPS, "train.accumulation": 2}
    short = {"train.steps": 1}
    torch = {
        "torch": arm(base),
        "dropout": arm({**base, "lora.dropout": 0.1, "train.steps": 2}),
        "gemma": arm({**short, "model.name": "tiny-gemma3-96"}),
    }
    files = record_all("torch", torch, folder)
    source, gemma = Path(files["torch"]), Path(files["gemma"])
    mlx = {
        "mlx": arm(base, source=source),
        "mlx gemma": arm({**short, "model.name": "tiny-gemma3-96"}, source=gemma),
        "mlx dropout": arm({**short, "lora.dropout": 0.1}),
        "mlx bfloat16": arm({**short, "model.dtype": "bfloat16"}),
    }
    with ThreadPoolExecutor(2) as pool:
        full = pool.submit(_program, "mlx_full.py", str(tiny_folder("tiny-llama")), str(folder / "full.h5"))
        trainer = pool.submit(record_all, "hf-trainer", {"trainer": arm(base, source=source)}, folder)
        files |= record_all("mlx", mlx, folder) | trainer.result()
        full.result()
    return files | {"full": str(folder / "full.h5")}


def _program(name: str, *arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "programs" / name), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def changed(source: Path, target: Path, edit: Edit, declared: dict[str, Any] | None = None) -> Path:
    """A copy of a trace whose rows went through `edit` (None: the row is left out)."""
    with open_trace(source) as trace:
        writer = TraceWriter(target, env=trace.env, declared={**trace.declared, **(declared or {})}, overwrite=True)
        for step, views in groupby(trace.rows(), key=lambda row: row.step):
            rows = [edit(_row(view)) for view in views]
            writer.write_step(step, [row for row in rows if row is not None], trace.observed)
        writer.finish()
    return target


def _row(view: RowView) -> Row:
    return Row(view.phase, view.step, view.micro_batch, tuple(_copy(view, i) for i in range(view.layout.records)))


def _copy(view: RowView, i: int) -> Record:
    entry, state = view.layout.entries[i], view.state(i)
    head = (entry.name, None, entry.dtype, entry.shape, entry.original, entry.transform, entry.alias_of)
    if entry.alias_of or not entry.stored:
        kept = None if entry.alias_of else Fingerprint(view.digests[i].tobytes(), view.stats[i])
        return Record(*head, stored=False, state=state, fingerprint=kept)
    data = view.read(i) if state in (State.VALUE, State.ZERO) else None
    return replace(Record(*head, state=state), data=data)


def times(phase: Phase, factor: float, *, step: int = 0, name: str = "") -> Edit:
    """Multiply the float records of a phase, at one step or all, by name or all."""

    def edit(row: Row) -> Row:
        if row.phase is not phase or step not in (0, row.step):
            return row
        return replace(row, records=tuple(_times(record, factor, name) for record in row.records))

    return edit


def _times(record: Record, factor: float, name: str) -> Record:
    if record.data is None or name not in record.name:
        return record
    return replace(record, data=(record.data * np.float32(factor)).astype(record.data.dtype))


def without(phase: Phase, name: str = "") -> Edit:
    """Leave out a phase, or the records of it with that name."""

    def edit(row: Row) -> Row | None:
        if row.phase is phase and not name:
            return None
        kept = tuple(record for record in row.records if row.phase is not phase or record.name != name)
        return replace(row, records=kept)

    return edit


def negated(row: Row) -> Row:
    """The fault of one layer: its gradient has the other sign at step 2."""
    return times(Phase.GRAD, -1.0, step=2, name=MIDDLE)(row)


def summed_over_padding(row: Row) -> Row:
    """Losses divided by another count of positions: 0.9 of the mean."""
    return times(Phase.LOSS, 0.9)(row)


PLANTED: dict[str, Edit] = {
    "scaled": times(Phase.GRAD, 1.01, step=2),
    "one layer": negated,
    "loss": summed_over_padding,
    "not finite": times(Phase.GRAD, np.nan, step=3, name=MIDDLE),
}
# Name -> the trace it is made of, and what is recomputed otherwise.
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("torch", {}),
    "mlx": ("mlx", {}),
    "trainer": ("trainer", {}),
    "full": ("full", {"model": "tiny-llama"}),
    "mlx bfloat16": ("mlx bfloat16", {}),
    "mlx in float64": ("mlx", {"dtype": "float64", "steps": [2, 2]}),
    "dropout": ("dropout", {}),
    "mlx gemma": ("mlx gemma", {}),
    "gemma": ("gemma", {}),
    # What cannot be answered.
    "mlx dropout": ("mlx dropout", {}),
    "dropout in float64": ("dropout", {"dtype": "float64"}),
    "another base": ("mlx", {"model": "tiny-gemma3-64"}),
    "other weights": ("mlx", {"model": "OTHER"}),
    "full without a name": ("full", {}),
    "no such base": ("mlx", {"model": "./nowhere"}),
}
REFUSED = {
    "mlx dropout": "trained with dropout 0.1 under mlx: its masks cannot be drawn again in torch",
    "dropout in float64": "its masks can be drawn again in float32 only",
    "another base": "of its weights are not in the trace (model.layers.0.self_attn.q_norm.weight",
    "other weights": "1 of 38 frozen weights differ (model.layers.1.mlp.up_proj.weight)",
    "full without a name": "does not say which base model it trained; give it: --model",
    "no such base": "is neither a folder nor a hub id",
}


@pytest.fixture(scope="session")
def answers(recorded: dict[str, Path], once: Once) -> tuple[dict[str, Path], dict[str, Any]]:
    """Every case recomputed in one process: traces by name, and what was measured or the error."""

    def make(folder: Path) -> Any:
        files = {name: str(file) for name, file in recorded.items()}
        files |= {name: str(changed(recorded["mlx"], folder / f"{name}.h5", edit)) for name, edit in PLANTED.items()}
        cases = {name: (files[of], dict(options)) for name, (of, options) in WHOLE.items()}
        cases |= {name: (files[name], {}) for name in PLANTED}
        cases["other weights"][1]["model"] = str(_other_base(folder / "base"))
        (folder / "cases.json").write_text(json.dumps(cases))
        _program("reference_many.py", str(folder / "cases.json"), str(folder / "results.json"))
        return {"files": files, "results": json.loads((folder / "results.json").read_text())}

    made = once("reference-answers", make)[1]
    return {name: Path(file) for name, file in made["files"].items()}, made["results"]


def _other_base(folder: Path) -> Path:
    """The tiny Llama with one element of one weight changed."""
    from safetensors.numpy import load_file, save_file

    folder.mkdir()
    source = tiny_folder("tiny-llama")
    tensors = load_file(str(source / "model.safetensors"))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-3
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


@pytest.fixture(scope="session")
def measured(answers: tuple[dict[str, Path], dict[str, Any]]) -> dict[str, Measured]:
    return {name: Measured.from_json(body) for name, body in answers[1].items() if "error" not in body}


@pytest.fixture(scope="session")
def files(answers: tuple[dict[str, Path], dict[str, Any]]) -> dict[str, Path]:
    return answers[0]


def side(measured: dict[str, Measured], name: str) -> ReferenceSide:
    return judge(measured[name], default_policy())


# A trace that is right follows.


@pytest.mark.parametrize("name", ["torch", "mlx", "trainer", "full", "mlx bfloat16", "gemma", "dropout"])
def test_a_trace_that_is_right_follows(name: str, measured: dict[str, Measured]) -> None:
    found = side(measured, name)
    assert found.follows, found.first
    assert found.first is None
    assert found.records > 50
    assert [step.step for step in found.steps] == list(range(1, len(found.steps) + 1))


@pytest.mark.parametrize("name", ["torch", "mlx", "trainer", "full"])
def test_float32_gradients_follow_to_a_few_parts_in_a_million(name: str, measured: dict[str, Measured]) -> None:
    assert max(step.worst for step in side(measured, name).steps) < 1e-5
    assert max(step.loss or 0.0 for step in side(measured, name).steps) < 1e-6


def test_float64_is_no_further_away(measured: dict[str, Measured]) -> None:
    double = measured["mlx in float64"]
    assert (double.dtype, [step.step for step in double.steps]) == ("float64", [2])
    assert max(double.steps[0].grads.values()) < 1e-5


def test_the_reduction_is_read_off_the_numbers(measured: dict[str, Measured]) -> None:
    found = {name: side(measured, name) for name in ("torch", "mlx", "trainer")}
    assert {name: (one.loss_rule, one.grad_rule) for name, one in found.items()} == {
        "torch": ("mean", "mean of means"),
        "mlx": ("mean", "mean of means"),
        "trainer": ("n/N", "token-weighted"),
    }


def test_full_fine_tuning_says_that_nothing_of_the_base_is_frozen(measured: dict[str, Measured]) -> None:
    assert side(measured, "full").notes == ("every weight is trained: the base is checked by names and shapes only",)


def test_dropout_of_torch_is_drawn_again(measured: dict[str, Measured]) -> None:
    assert "drawn again" in measured["dropout"].notes[0]
    assert max(side(measured, "dropout").steps, key=lambda step: step.worst).worst < 1e-5


def test_dora_copied_modules_autocast_and_later_trained_weights_follow(tmp_path: Path) -> None:
    cases = ("dora", "modules_to_save", "autocast", "unfrozen_later")
    _program("reference_varieties.py", str(tmp_path), *cases)
    found = {
        name: Measured.from_json(body) for name, body in json.loads((tmp_path / "results.json").read_text()).items()
    }
    sides = {name: side(found, name) for name in cases}
    assert {name: (one.verdict, len(one.steps)) for name, one in sides.items()} == {
        "dora": ("follows", 3),
        "modules_to_save": ("follows", 3),
        "autocast": ("follows", 3),
        "unfrozen_later": ("follows", 1),
    }
    assert sides["unfrozen_later"].notes == (
        "left out: step 2 has a gradient of model.norm.weight, which was not trained at step 0 (and 1 more)",
    )
    assert [found[name].run_dtype for name in cases] == ["float32", "float32", "bfloat16", "float32"]
    assert max(step.worst for name in ("dora", "modules_to_save") for step in sides[name].steps) < 1e-5


# A planted fault is named.


def test_the_rounded_embedding_scale_is_on_the_side_of_mlx(measured: dict[str, Measured]) -> None:
    first = side(measured, "mlx gemma").first
    assert first is not None
    assert (first.step, first.phase, first.micro_batch, first.name) == (1, "loss", 0, "loss")
    assert side(measured, "gemma").follows


def test_scaled_gradients_are_named_with_their_factor(measured: dict[str, Measured]) -> None:
    first = side(measured, "scaled").first
    assert first is not None
    assert (first.step, first.phase) == (2, "grad")
    assert first.detail == "every gradient of the step is 1.01 times the reference's"
    assert [step.follows for step in side(measured, "scaled").steps] == [True, False, True]


def test_one_wrong_gradient_is_named(measured: dict[str, Measured]) -> None:
    found = side(measured, "one layer")
    assert found.first is not None
    assert (found.first.step, found.first.phase, found.first.name) == (2, "grad", MIDDLE)
    assert found.first.error == pytest.approx(2.0, rel=1e-4)
    assert (found.first.detail, found.departures) == ("", 1)


def test_a_loss_under_no_known_reduction_is_named_with_its_factor(measured: dict[str, Measured]) -> None:
    found = side(measured, "loss")
    assert found.first is not None
    assert (found.first.step, found.first.phase, found.first.micro_batch) == (1, "loss", 0)
    assert found.first.detail == "every loss of the step is 0.9 times the reference's"
    assert found.departures == 2 * STEPS


def test_a_gradient_that_is_not_finite_does_not_follow(measured: dict[str, Measured]) -> None:
    first = side(measured, "not finite").first
    assert first is not None
    assert (first.step, first.name, first.error) == (3, MIDDLE, np.inf)


# The diff says which side is wrong.


def compare(files: dict[str, Path], measured: dict[str, Measured], a: str, b: str) -> DiffResult:
    return diff(files[a], files[b], DiffOptions(reference=References(measured[a], measured[b])))


@pytest.mark.parametrize(
    ("fault", "step", "phase"), [("scaled", 2, "grad"), ("one layer", 2, "grad"), ("loss", 1, "loss")]
)
def test_a_diff_says_which_side_does_not_follow(
    fault: str, step: int, phase: str, files: dict[str, Path], measured: dict[str, Measured]
) -> None:
    for a, b, wrong, right in (("torch", fault, "b", "a"), (fault, "torch", "a", "b")):
        result = compare(files, measured, a, b)
        assert result.first is not None
        assert (result.first.step, result.first.phase) == (step, phase)
        assert result.first.detail.startswith(f"{wrong} does not follow the reference (error ")
        assert f"; {right} follows the reference (error " in result.first.detail
        assert result.reference is not None
        verdicts = {"a": result.reference.a.verdict, "b": result.reference.b.verdict}
        assert verdicts == {wrong: "does not follow", right: "follows"}


def test_the_reference_changes_no_verdict_where_both_sides_follow(
    files: dict[str, Path], measured: dict[str, Measured]
) -> None:
    result = compare(files, measured, "torch", "mlx")
    assert result.verdict is Verdict.SAME
    assert result.reference is not None
    assert result.reference.a.follows
    assert result.reference.b.follows


def test_two_reductions_are_a_divergence_though_each_side_follows(
    files: dict[str, Path], measured: dict[str, Measured]
) -> None:
    result = compare(files, measured, "mlx", "trainer")
    assert result.first is not None
    assert (result.first.step, result.first.phase) == (1, "grad")
    assert result.first.detail == (
        "each side follows the reference, a with the mean of means of the gradients, b with the token-weighted"
    )


def test_a_wrong_gradient_is_found_though_the_models_differ_from_the_start(
    files: dict[str, Path], measured: dict[str, Measured], recorded: dict[str, Path], tmp_path: Path
) -> None:
    """Another batch at every step leaves nothing to compare across: only the reference can judge."""
    other = changed(recorded["torch"], tmp_path / "other.h5", _one_label_less)
    pairs = {"clean": "mlx", "one layer": "one layer"}
    found = {}
    for name, b in pairs.items():
        reference = References(replace(measured["torch"], trace=str(other)), measured[b])
        without_reference = diff(other, files[b])
        result = diff(other, files[b], DiffOptions(reference=reference))
        assert {one.phase for one in without_reference.findings} <= {"batch", "clipped_grad", "opt_state", "param"}
        found[name] = [(one.step, one.name) for one in result.findings if one.phase == "grad"]
    assert found == {"clean": [], "one layer": [(2, MIDDLE)]}


def _one_label_less(row: Row) -> Row:
    if row.phase is not Phase.BATCH:
        return row
    return replace(row, records=tuple(_masked(record) for record in row.records))


def _masked(record: Record) -> Record:
    if record.name != "labels" or record.data is None:
        return record
    data = np.array(record.data)
    data[0, 2] = -100
    return replace(record, data=data)


@pytest.mark.parametrize("form", ["text", "json", "markdown", "html"])
def test_every_report_shows_what_the_reference_says(
    form: str, files: dict[str, Path], measured: dict[str, Measured]
) -> None:
    pytest.importorskip("jinja2")
    options = DiffOptions(series=True, reference=References(measured["torch"], measured["one layer"]))
    text = reporter(form)(diff(files["torch"], files["one layer"], options), Style(width=200))
    if form == "json":
        body = json.loads(text)["reference"]
        assert (body["a"]["verdict"], body["b"]["verdict"]) == ("follows", "does not follow")
        assert body["b"]["first"]["name"] == MIDDLE
        assert [step["follows"] for step in body["b"]["steps"]] == [True, False, True]
    else:
        assert "b does not follow the reference (torch " in text
        assert "a follows the reference (torch " in text


# What cannot be answered.


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_says_why(name: str, answers: tuple[dict[str, Path], dict[str, Any]]) -> None:
    error = answers[1][name].get("error", "")
    assert REFUSED[name] in error
    assert error.endswith("[no-reference]")


def usable(path: Path, first: int = 1) -> list[int]:
    with open_trace(path) as trace:
        return Recorded(trace).usable([step for step in trace.steps if step >= first])[0]


LACKS: dict[str, tuple[Edit, str]] = {
    "batch": (
        without(Phase.BATCH),
        "has no batch: what the model was given; record it again with --what including batch",
    ),
    "grad": (without(Phase.GRAD), "has no grad: gradients to compare with"),
    "labels": (without(Phase.BATCH, "labels"), "step 1 has no labels in batch, micro-batch 0"),
    "scale": (without(Phase.INIT, f"{MIDDLE.removesuffix('.lora_B.weight')}.lora_scale"), "scale is not guessed"),
    "factor": (without(Phase.INIT, MIDDLE.replace("lora_B", "lora_A")), "without"),
    "parameters": (without(Phase.PARAM), "step 2 cannot be started: there is no param at step 1"),
}


@pytest.mark.parametrize("name", LACKS)
def test_a_trace_that_lacks_something_is_refused_by_name(name: str, recorded: dict[str, Path], tmp_path: Path) -> None:
    edit, said = LACKS[name]
    kept = _unaliased(edit)
    path = changed(recorded["mlx"], tmp_path / "less.h5", kept)
    with pytest.raises(NoReference) as caught:
        usable(path, first=2 if name == "parameters" else 1)
    assert said in caught.value.line()


def _unaliased(edit: Edit) -> Edit:
    """The edit, and no clipped_grad: it may refer to what is left out."""
    return lambda row: None if row.phase is Phase.CLIPPED_GRAD else edit(row)


def test_what_the_rebuilt_model_has_no_place_for_is_named(recorded: dict[str, Path], tmp_path: Path) -> None:
    def thaw(row: Row) -> Row:
        late = Record("model.norm.weight", np.ones(64, np.float32), "float32", (64,))
        return replace(row, records=(*row.records, late)) if (row.phase, row.step) == (Phase.GRAD, 2) else row

    def see(row: Row) -> Row:
        pixels = Record("pixel_values", np.ones((2, 4), np.float32), "float32", (2, 4))
        return replace(row, records=(*row.records, pixels)) if (row.phase, row.step) == (Phase.BATCH, 3) else row

    with open_trace(changed(recorded["mlx"], tmp_path / "odd.h5", lambda row: see(thaw(row)))) as trace:
        good, left_out = Recorded(trace).usable([1, 2, 3])
    assert good == [1]
    assert left_out == [
        "step 2 has a gradient of model.norm.weight, which was not trained at step 0",
        "step 3 feeds the model pixel_values, which the reference does not",
    ]


def test_a_quantized_base_is_refused(recorded: dict[str, Path], tmp_path: Path) -> None:
    def quantize(row: Row) -> Row:
        if row.phase is not Phase.INIT:
            return row
        name = "model.layers.0.mlp.up_proj"
        packed = tuple(
            replace(record, dtype="uint32") if record.name == f"{name}.weight" else record for record in row.records
        )
        scales = Record(f"{name}.scales", np.ones((4, 4), np.float32), "float32", (4, 4), stored=False)
        return replace(row, records=(*packed, scales))

    path = changed(recorded["mlx"], tmp_path / "quantized.h5", quantize)
    with pytest.raises(NoReference, match="quantized base"):
        usable(path)


def test_steps_that_cannot_be_recomputed_are_left_out_by_name(recorded: dict[str, Path], tmp_path: Path) -> None:
    edit: Edit = lambda row: None if row.phase is Phase.PARAM and row.step == 1 else row  # noqa: E731
    with open_trace(changed(recorded["mlx"], tmp_path / "less.h5", edit)) as trace:
        good, left_out = Recorded(trace).usable([1, 2, 3])
    assert (good, left_out) == ([1, 3], ["step 2 cannot be started: there is no param at step 1"])


# The commands.


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tracer", *arguments], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip


def test_verify_prints_the_verdict_first_and_a_line_a_step(files: dict[str, Path]) -> None:
    done = command("verify", str(files["one layer"]), "--steps", "2:3")
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert any("base tiny-llama (38 frozen weights are the same to the bit)" in line for line in lines)
    assert lines[0] == f"DOES NOT FOLLOW the reference at step 2, grad, {MIDDLE}"
    assert [line.split()[0] for line in lines[-2:]] == ["2", "3"]
    assert lines[-2].endswith(f"{MIDDLE}  does not follow")
    assert lines[-1].split()[-1].endswith(".weight")


def test_diff_with_a_reference_names_the_wrong_side(files: dict[str, Path]) -> None:
    done = command("diff", str(files["torch"]), str(files["scaled"]), "--reference", "torch", "--steps", "2:2")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("DIVERGED at step 2, grad, ")
    assert "  verify   b does not follow the reference (torch " in done.stdout
    assert "  verify   a follows the reference (torch " in done.stdout


def test_no_answer_is_exit_code_2(files: dict[str, Path]) -> None:
    done = command("verify", str(files["mlx dropout"]))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.endswith("[no-reference]\n")


# The rules.


def test_the_weights_of_the_reductions() -> None:
    tokens = [10, 30]
    assert rules.loss_weights("mean", tokens) == [1.0, 1.0]
    assert rules.loss_weights("1/K", tokens) == [0.5, 0.5]
    assert rules.loss_weights("n/N", tokens) == [0.25, 0.75]
    assert rules.loss_weights("sum", tokens) == [10.0, 30.0]
    assert rules.grad_weights("mean of means", tokens) == [0.5, 0.5]
    assert rules.grad_weights("token-weighted", tokens) == [0.25, 0.75]
    assert rules.grad_weights("sum of means", tokens) == [1.0, 1.0]
    assert rules.grad_weights("sum", tokens) == [10.0, 30.0]


def test_a_fault_at_one_step_does_not_choose_the_rule() -> None:
    errors = {"mean of means": [1e-6, 2e-6, 0.5], "token-weighted": [0.1, 0.1, 1e-6]}
    assert rules.chosen(errors) == "mean of means"


def test_of_rules_that_are_the_same_number_the_first_is_chosen() -> None:
    errors = {"mean of means": [2e-6, 2e-6], "token-weighted": [1.9e-6, 2e-6], "sum": [10.0, 10.0]}
    assert rules.chosen(errors) == "mean of means"
    assert rules.chosen({"mean": [], "sum": []}) == "mean"


def test_an_unknown_loss_is_an_infinite_error_unless_both_are_nan() -> None:
    assert rules.loss_error(np.nan, 2.0, 1.0) == np.inf
    assert rules.loss_error(np.nan, np.nan, 1.0) == 0.0
    assert rules.loss_error(4.0, 2.0, 2.0) == 0.0


def test_what_was_measured_survives_json(measured: dict[str, Measured]) -> None:
    for one in measured.values():
        assert Measured.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one
