"""The catalogue covers both lists, its entries are checked strictly, and a wrong expectation fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from differ.causes import ids as cause_ids
from scenarios import catalogue
from scenarios.catalogue import programs, recording, reports
from scenarios.catalogue.entry import BUG_ROWS, NO_CAUSE, STORY_ROWS, Entry, identity, parse_entry
from scenarios.catalogue.page import page
from scenarios.catalogue.recording import Failure, Recorded, jobs_of, key_of
from scenarios.catalogue.running import Outcome, Report, Status, judge
from scenarios.catalogue.seeds import shifted, with_seeds
from scenarios.catalogue.seeds import table as table_of_seeds
from scenarios.paths import path_info
from scenarios.scenarios_command import scenarios
from tests.scenarios.conftest import Once, needs_mlx, needs_torch
from tracer.errors import TraceError

ROOT = Path(__file__).parents[2]
# A few that need little: one process of PyTorch, the others of MLX.
RUN = (
    "bug-05-no-bias-correction",
    "story-02-seed-before-load",
    "story-13-compiled-or-eager",
    "story-17-callback-arity",
)
BUG = RUN[0]


def table(name: str) -> dict[str, Any]:
    return tomllib.loads((catalogue.FOLDER / f"{name}.toml").read_text())


# Registry and schema.


def test_every_row_of_both_lists_is_covered_once() -> None:
    rows = [row for entry in catalogue.load_all() for row in entry.rows]
    assert sorted(rows) == sorted(
        [*(f"story {n}" for n in range(1, STORY_ROWS + 1)), *(f"bug {n}" for n in range(1, BUG_ROWS + 1))]
    )


@pytest.mark.parametrize("name", catalogue.ids())
def test_an_entry_says_what_it_must(name: str) -> None:
    entry = catalogue.load(name)
    word, number = entry.rows[0].split()
    assert entry.id.startswith(f"{word}-{int(number):02d}-")
    assert all(link.startswith("https://github.com/") for link in entry.source)
    used = {arm for check in entry.checks for arm in check.arms} | {s for a in entry.arms.values() for s in a.sources}
    assert used == set(entry.arms), "an arm that nothing looks at"
    causes = [c for check in entry.checks for c in (check.first, *check.also) if c is not None]
    assert {cause.id for cause in causes} <= {*cause_ids(), NO_CAUSE}
    assert {note for check in entry.checks for note in check.notes} <= set(cause_ids())
    assert entry.checks[-1].arms == ("a", "clean")


def test_every_program_is_used() -> None:
    used = {arm.runner for entry in catalogue.load_all() for arm in entry.arms.values() if arm.program}
    assert used == set(programs.names())


@pytest.mark.parametrize("name", programs.names())
def test_a_program_beside_a_path_needs_no_more_than_the_path(name: str) -> None:
    path = programs.beside(name)
    assert path is None or set(programs.program(name).NEEDS) <= set(path_info(path).needs)


def test_reading_the_catalogue_imports_no_framework() -> None:
    code = "import sys; from scenarios import catalogue; from scenarios.catalogue import programs\n"
    code += "catalogue.load_all(); [programs.missing(n) for n in programs.names()]\n"
    code += "print(sorted({'torch', 'mlx', 'mlx_lm', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_the_page_is_what_the_catalogue_says() -> None:
    path = ROOT / "docs" / "scenarios.md"
    assert path.read_text() == page(), "run: python -m scenarios.catalogue.page > docs/scenarios.md"


def test_a_new_scenario_is_one_new_file(tmp_path: Path) -> None:
    shutil.copy(catalogue.FOLDER / f"{BUG}.toml", tmp_path / "mine.toml")
    assert catalogue.ids(tmp_path) == ("mine",)
    assert catalogue.load("mine", tmp_path).title == catalogue.load(BUG).title


Change = Callable[[dict[str, Any]], object]
BAD: dict[str, tuple[Change, str]] = {
    "an unknown key": (lambda t: t.update(colour="red"), "colour is not known"),
    "an unknown key of an arm": (lambda t: t["arms"]["a"].update(pth="x"), "pth is not known"),
    "an unknown key of an expectation": (lambda t: t["expect"][0].update(stp=1), "stp is not known"),
    "no source": (lambda t: t.update(source=[]), "source is missing"),
    "nothing expected": (lambda t: t.update(expect=[]), "expect is missing"),
    "no clean arm": (lambda t: t["arms"].pop("clean"), "no arm clean"),
    "a clean arm that is arm a": (lambda t: t["arms"].update(clean=dict(t["arms"]["a"])), "are the same run"),
    "an arm and itself": (lambda t: t["expect"][0].update(pair=["b", "b"]), "are the same run"),
    "an arm that is not there": (lambda t: t["expect"][0].update(pair=["a", "c"]), "c is not an arm"),
    "an arm below": (lambda t: t["arms"]["a"].update({"from": "b"}), "no arm above"),
    "no step": (lambda t: t["expect"][0].pop("step"), "step is missing"),
    "a finding of runs that are same": (lambda t: t["expect"][0].update(verdict="same"), "goes with the verdict"),
    "an unknown path": (lambda t: t["arms"]["b"].update(path="cuda"), "no path called cuda"),
    "an unknown program": (lambda t: (t["arms"]["b"].pop("path"), t["arms"]["b"].update(program="x")), "no program"),
    "an unknown setting": (lambda t: t["settings"].update(train={"epochs": 1}), "train.epochs is not a setting"),
    "a step in words": (lambda t: t["expect"][0].update(step="one"), "must be of type int"),
    "ranks of a path": (lambda t: t["arms"]["b"].update(ranks=2), "ranks are processes of a program"),
    "a row beyond the list": (lambda t: t.update(bug=26), "is not a row"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_entry_that_is_wrong_is_refused(name: str) -> None:
    change, said = BAD[name]
    given = table(BUG)
    change(given)
    with pytest.raises(TraceError, match=said):
        parse_entry(BUG, given)


def test_runs_with_the_same_content_are_one() -> None:
    given = table(BUG)
    given["arms"]["other"] = {"path": "torch", "settings": {"train.steps": 2, "data.rows": 32}}  # 32 is the default
    given["expect"][0]["pair"] = ["other", "b"]
    entry = parse_entry(BUG, given)
    assert identity(entry.arms, "other") == identity(entry.arms, "a")
    assert len(jobs_of([entry])) == len(entry.arms) - 1


# Running.


@pytest.fixture(scope="session")
def kept(once: Once) -> Path:
    """The folder of a run of RUN through the command line; its output is beside the traces."""

    def run(folder: Path) -> int:
        command = [sys.executable, "-m", "tracer", "scenarios", "run", *RUN, "--keep", str(folder), "--format", "junit"]
        done = subprocess.run([*command, "--jobs", "2"], capture_output=True, text=True, cwd=ROOT)
        (folder / "results.xml").write_text(done.stdout)
        (folder / "said.txt").write_text(done.stderr)
        return done.returncode

    folder, code = once("catalogue", run)
    assert code == 0, (folder / "said.txt").read_text() + (folder / "results.xml").read_text()
    return folder


@needs_torch
@needs_mlx
def test_scenarios_run_as_expected_and_leave_traces_and_reports(kept: Path) -> None:
    suite = ET.parse(kept / "results.xml").getroot()[0]
    assert suite.tag == "testsuite"
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == [str(len(RUN)), "0", "0", "0"]
    assert [case.get("name") for case in suite.iter("testcase")] == list(RUN)
    for name in RUN:
        entry = catalogue.load(name)
        compared = [check for check in entry.checks if not check.error]
        assert all((kept / f"{key_of(entry, arm)}.h5").is_file() for check in compared for arm in check.arms)
        assert all("<html" in (kept / f"{name}.{'-'.join(check.arms)}.html").read_text() for check in compared)
    assert (kept / "said.txt").read_text() == f"wrote {kept}\n"


def expect(**changes: Any) -> Change:
    return lambda t: t["expect"][0].update(changes)


# Change of the expectation of bug 5 -> what the difference is about.
WRONG: dict[str, tuple[Change, str]] = {
    "step": (expect(step=2), "first"),
    "phase": (expect(phase="grad"), "first"),
    "kind": (expect(kind="missing_a"), "kind"),
    "names": (expect(names=["*.lora_A.weight"]), "names"),
    "fewer names": (expect(names=["*.q_proj.lora_B.weight"]), "also"),
    "more names": (expect(names=["*"]), "not model.layers.0"),
    "cause": (expect(cause="optimizer.eps"), "first cause"),
    "no cause": (expect(cause=NO_CAUSE), "cause"),
    "number": (expect(parameters={"ratio": 3.2}), "ratio"),
    "side": (expect(side="a"), "side"),
    "another cause": (expect(also=[{"id": "clip.value"}]), "cause: expected clip.value"),
    "its step": (expect(also=[{"id": "optimizer.bias_correction", "step": 2}]), "step"),
    "note": (expect(notes=["grad.scale"]), "note"),
    "verdict": (lambda t: t.update(expect=[{"verdict": "same"}]), "verdict"),
    "bits": (lambda t: t.update(expect=[{"verdict": "same", "bits": True, "pair": ["a", "clean"]}]), "bit"),
    "error": (lambda t: t["expect"].append({"arm": "b", "error": "nothing-recorded"}), "the error"),
}


@needs_torch
@needs_mlx
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_expectation_fails(name: str, kept: Path) -> None:
    change, said = WRONG[name]
    given = table(BUG)
    change(given)
    outcome = judge(parse_entry(BUG, given), Recorded(kept), html=False)
    assert outcome.status is Status.OTHER
    wrong = [sentence for one in outcome.compared for sentence in one.wrong]
    assert wrong
    assert any(said in sentence for sentence in wrong), wrong
    assert Report((outcome,), 1, 1.0).exit_code == 1


@needs_torch
@needs_mlx
def test_the_right_expectation_passes_on_the_same_traces_with_its_number(kept: Path) -> None:
    given = table(BUG)
    expect(side="b", parameters={"ratio": 3.1623}, tolerance=1e-4, kind="value")(given)
    assert judge(parse_entry(BUG, given), Recorded(kept), html=False).status is Status.EXPECTED


@needs_torch
@needs_mlx
def test_a_clean_arm_that_is_not_same_fails(kept: Path) -> None:
    given = table(BUG)
    given["arms"]["clean"], given["arms"]["b"] = given["arms"]["b"], given["arms"]["clean"]
    outcome = judge(parse_entry(BUG, given), Recorded(kept), html=False)
    assert outcome.status is Status.OTHER
    assert outcome.compared[-1].arms == ("a", "clean")
    assert outcome.compared[-1].wrong


def test_what_cannot_run_here_is_named_and_never_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording.Job, "missing", lambda job: ("anvil",) if job.runner[1] == "torch" else ())
    entry = catalogue.load(BUG)
    told: list[None] = []
    recorded = recording.record_all([entry], tmp_path, workers=1, told=lambda: told.append(None))
    assert len(told) == len(recorded.failures) == 3  # what starts from the run that cannot be is not run either
    outcome = judge(entry, recorded, html=False)
    assert (outcome.status, outcome.reason) == (Status.SKIPPED, "needs anvil")
    report = Report((outcome,), 3, 0.1)
    assert report.exit_code == 2
    assert "needs anvil" in reports.text(report)
    assert ET.fromstring(reports.junit(report))[0].get("skipped") == "1"


@needs_mlx
def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    given = table(BUG)
    given["settings"] = {"model": {"attention": "eager"}}  # MLX has one implementation
    seeds = {"a": 0, "b": 1, "clean": 2}
    given["arms"] = {arm: {"path": "mlx", "settings": {"train": {"seed": seed}}} for arm, seed in seeds.items()}
    entry = parse_entry("broken", given)
    recorded = recording.record_all([entry], tmp_path, workers=2)
    outcome = judge(entry, recorded, html=False)
    assert outcome.status is Status.ERROR
    assert "model.attention" in outcome.reason
    assert Report((outcome,), 3, 0.1).exit_code == 2
    assert ET.fromstring(reports.junit(Report((outcome,), 3, 0.1)))[0].get("errors") == "1"


def outcome_of(entry: Entry, failure: Failure, folder: Path) -> Any:
    keys = [key_of(entry, arm) for arm in entry.arms]
    return judge(entry, Recorded(folder, dict.fromkeys(keys, failure)), html=False)


def test_every_format_tells_what_is_wrong(tmp_path: Path) -> None:
    outcome = outcome_of(catalogue.load(BUG), Failure("it <burst> | \x00"), tmp_path)
    report = Report((outcome,), 3, 0.1)
    assert all("burst" in render(report) for render in reports.FORMATS.values())
    assert json.loads(reports.as_json(report))["scenarios"][0]["status"] == "error"
    assert ET.fromstring(reports.junit(report))[0].get("errors") == "1"


# Seeds.


def test_other_seeds_are_other_runs_of_the_same_pair() -> None:
    entry = catalogue.load(BUG)
    first, second = with_seeds([entry], 2)
    assert [identity(first.arms, arm) for arm in entry.arms] == [identity(entry.arms, arm) for arm in entry.arms]
    assert len(jobs_of([first, second])) == 2 * len(jobs_of([entry]))
    settings = identity(second.arms, "b")["settings"]
    assert (settings["train.seed"], settings["data.seed"]) == (1, 1)
    assert second.checks == entry.checks


def test_a_seed_that_a_program_is_given_is_shifted_too() -> None:
    entry = catalogue.load("story-17-callback-arity")
    arms = {**entry.arms, "a": replace(entry.arms["a"], options={"takes": 9, "seed": 3})}
    assert shifted(replace(entry, arms=arms), 2).arms["a"].options == {"takes": 9, "seed": 5}


def test_the_table_of_seeds_counts_those_as_expected_and_says_what_the_others_are(tmp_path: Path) -> None:
    first, second = with_seeds([catalogue.load(BUG)], 2)
    right = Outcome(first, Status.EXPECTED, ())
    said = table_of_seeds(Report((right, outcome_of(second, Failure("it burst"), tmp_path)), 6, 0.1))
    assert f"{BUG}  1 of 2 seeds as expected" in said
    assert "seeds + 1: arm a: it burst" in said


@needs_torch
@needs_mlx
def test_a_pair_is_run_with_several_seeds() -> None:
    command = [sys.executable, "-m", "tracer", "scenarios", "run", RUN[1], "--seeds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{RUN[1]}  2 of 2 seeds as expected" in done.stdout


# The command line.


def test_list_and_show_tell_what_there_is() -> None:
    listed = CliRunner().invoke(scenarios, ["list"]).stdout.splitlines()
    assert [line.split()[0] for line in listed] == list(catalogue.ids())
    shown = CliRunner().invoke(scenarios, ["show", BUG]).stdout
    for part in ("mlx/pull/1640", "path torch", "optimizer.bias_correction = False", "expected  a and clean: same"):
        assert part in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "bug-05"], BUG),
        (["run", "nonsense"], "no scenario called"),
        (["run"], "--all"),
        (["run", "--all", BUG], "--all"),
    ],
)
def test_what_was_not_asked_well_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "tracer", "scenarios", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
