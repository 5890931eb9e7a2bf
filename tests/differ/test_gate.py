"""Gates: a baseline that is kept, five faults that turn it red, and everything that is no answer."""

from __future__ import annotations

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import pytest

from differ import baseline as baselines
from differ.gate import find_project, load_gates
from tests.builders import make_trace
from tracer.cli.main import main
from tracer.errors import BadConfig, NotFound
from tracer.reader import open_trace

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests/programs/synthetic.py"

# Fault -> where the first line of a report must say that it is.
PLANTED = {
    "lr": "DIVERGED at step 1, hparams, group0.lr",
    "init_draw": "DIVERGED at step 0, init, model.layers.",
    "label_masked": "DIVERGED at step 2, batch, micro-batch ",
    "clip_value": "DIVERGED at step 1, clipped_grad, model.layers.",
    "grad_factor": "DIVERGED at step 1, grad, model.layers.",
}


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object, cwd: Path, **env: str) -> Done:
    """`trace gate` in this process; what it records runs in one of its own all the same."""
    out, err = io.StringIO(), io.StringIO()
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "200", **env}
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(patch.dict(os.environ, environment))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stop = stack.enter_context(pytest.raises(SystemExit))
        main(["gate", *map(str, arguments)])
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def project(
    folder: Path, *arguments: str, name: str = "lora", baseline: str = "traces/lora.h5", more: str = ""
) -> Path:
    """Add a gate to the pyproject.toml of a folder."""
    command = json.dumps(["python", str(PROGRAM), *arguments])
    with (folder / "pyproject.toml").open("a") as file:
        file.write(f'[tool.trace.gate.{name}]\ncommand = {command}\nbaseline = "{baseline}"\n{more}\n')
    return folder


def golden(folder: Path, name: str = "lora.h5", **settings: object) -> Path:
    """A baseline made by the very program, through the gate, so that it is what a user has."""
    done = run("--update", cwd=project(folder))
    assert done.returncode == 1, done.stderr
    (folder / "pyproject.toml").unlink()
    return folder / "traces" / name


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden(tmp_path_factory.mktemp("golden"))


@pytest.fixture
def folder(tmp_path: Path, good: Path) -> Path:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces/lora.h5").write_bytes(good.read_bytes())
    return tmp_path


def test_a_run_that_is_as_its_baseline_is_green(folder: Path) -> None:
    done = run(cwd=project(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SAME  3 steps")
    assert "a is the baseline traces/lora.h5" in done.stdout
    assert "training" not in done.stdout


@pytest.mark.parametrize("fault", sorted(PLANTED))
def test_a_planted_fault_turns_it_red_in_every_report(folder: Path, fault: str) -> None:
    done = run("--artifacts", "out", cwd=project(folder, fault))
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(PLANTED[fault])
    kept = {path.name for path in (folder / "out").iterdir()}
    assert {"lora.h5", "lora.log", "lora.txt", "lora.md", "lora.json", "lora.junit.xml"} <= kept
    with open_trace(folder / "out/lora.h5") as trace:
        assert trace.last_step == 3
    assert (folder / "out/lora.txt").read_text().startswith(PLANTED[fault].split(", model")[0])
    document = json.loads((folder / "out/lora.json").read_text())
    address = f"step {document['first']['step']}, {document['first']['phase']}"
    assert address in PLANTED[fault]
    assert address in (folder / "out/lora.md").read_text().replace("`", "").replace("\\", "")
    suites = ElementTree.parse(folder / "out/lora.junit.xml")
    failed = [case.get("name") for case in suites.iter("testcase") if case.find("failure") is not None]
    assert failed[0] is not None
    assert failed[0].startswith(document["first"]["phase"])


def test_a_fingerprint_as_baseline_is_green_and_turns_red(tmp_path: Path) -> None:
    project(tmp_path, more="fingerprint = true")
    assert run("--update", cwd=tmp_path).returncode == 1
    with open_trace(tmp_path / "traces/lora.h5") as trace:
        assert trace.fingerprint
    assert run(cwd=tmp_path).returncode == 0
    (tmp_path / "pyproject.toml").unlink()
    done = run(cwd=project(tmp_path, "grad_factor"))
    assert done.returncode == 1
    assert done.stdout.startswith(PLANTED["grad_factor"])
    assert "is a fingerprint" in " ".join(done.stdout.split())


def test_update_shows_what_changed_and_exits_1_and_then_0(folder: Path) -> None:
    project(folder, "clip_value")
    before = (folder / "traces/lora.h5").read_bytes()
    first = run("--update", cwd=folder)
    assert first.returncode == 1
    assert first.stdout.startswith(PLANTED["clip_value"])
    assert "wrote traces/lora.h5" in first.stderr
    assert "review and commit" in first.stderr
    after = (folder / "traces/lora.h5").read_bytes()
    assert after != before
    again = run("--update", cwd=folder)
    assert again.returncode == 0, again.stdout
    assert "nothing changed" in again.stderr
    assert (folder / "traces/lora.h5").read_bytes() == after
    assert run(cwd=folder).returncode == 0


def test_a_missing_baseline_is_exit_code_2_with_the_command_that_makes_it(tmp_path: Path) -> None:
    done = run(cwd=project(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "trace gate --update lora" in done.stderr
    assert "recording" not in done.stderr


def test_a_program_that_fails_is_no_answer_and_its_words_are_shown(folder: Path) -> None:
    done = run("--artifacts", "out", cwd=project(folder, "--die"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert "out of cheese" in done.stderr
    assert "out of cheese" in (folder / "out/lora.log").read_text()


def test_a_recording_that_stopped_is_no_answer_and_never_a_baseline(folder: Path) -> None:
    project(folder, "--stop-early")
    before = (folder / "traces/lora.h5").read_bytes()
    for options in ((), ("--update",)):
        done = run(*options, cwd=folder)
        assert done.returncode == 2
        assert "the disk is full" in done.stderr
    assert (folder / "traces/lora.h5").read_bytes() == before


def test_unused_baselines_are_reported(folder: Path) -> None:
    (folder / "traces/old.h5").write_bytes(b"")
    done = run(cwd=project(folder))
    assert done.returncode == 0
    assert "unused baseline: traces/old.h5" in done.stderr
    assert "lora.h5 is beside" not in done.stderr


def test_a_gate_without_an_answer_does_not_stop_the_others(folder: Path) -> None:
    project(folder, "--die", name="dead", baseline="traces/dead.h5")
    (folder / "traces/dead.h5").write_bytes((folder / "traces/lora.h5").read_bytes())
    project(folder, "lr")
    done = run(cwd=folder)
    assert done.returncode == 2
    assert done.stdout.startswith(PLANTED["lr"])
    assert "2 gates: 1 changed, 1 without an answer" in done.stderr
    assert run("lora", cwd=folder).returncode == 1


def test_steps_narrow_what_is_recorded_and_compared(folder: Path) -> None:
    assert run(cwd=project(folder, "label_masked", more='steps = "1:1"')).returncode == 0
    (folder / "pyproject.toml").unlink()
    assert run(cwd=project(folder, "label_masked", more='steps = ":2"')).returncode == 1


def test_a_policy_of_the_gate_decides(folder: Path) -> None:
    (folder / "loose.toml").write_text('[[rule]]\nname = "group0.lr"\nphase = "hparams"\nbase = 1.0\n')
    assert run(cwd=project(folder, "lr", more='policy = "loose.toml"')).returncode == 0


def test_twins_of_the_baseline_are_the_noise_floor_of_a_gate(folder: Path) -> None:
    twins = [f"traces/lora.twin-{seed}.h5" for seed in (1, 2)]
    for seed, twin in enumerate(twins, 1):
        make_trace(folder / twin, noise=3e-4, noise_seed=seed)
    more = f"noise = {json.dumps(twins)}"
    noisy = run(cwd=project(folder, "--noisy", more=more))
    assert noisy.returncode == 0, noisy.stdout
    assert "unused" not in noisy.stderr
    (folder / "pyproject.toml").unlink()
    assert run(cwd=project(folder, "--noisy")).returncode == 1
    (folder / "pyproject.toml").unlink()
    assert run(cwd=project(folder, "lr", "--noisy", more=more)).returncode == 1
    (folder / "pyproject.toml").unlink()
    missing = run(cwd=project(folder, more='noise = ["traces/none.h5"]'))
    assert missing.returncode == 2
    assert "none.h5" in missing.stderr


def test_github_gets_a_summary_and_an_output(folder: Path) -> None:
    files = {"GITHUB_STEP_SUMMARY": str(folder / "summary.md"), "GITHUB_OUTPUT": str(folder / "output")}
    done = run("--format", "github", cwd=project(folder, "lr"), **files)
    assert done.returncode == 1
    assert "::error title=DIVERGED" in done.stderr
    assert "diverged" in (folder / "output").read_text()
    assert "hparams" in (folder / "summary.md").read_text()


def test_one_document_holds_one_gate(folder: Path) -> None:
    project(folder)
    project(folder, name="two", baseline="traces/two.h5")
    done = run("--format", "json", cwd=folder)
    assert done.returncode == 2
    assert "--artifacts" in done.stderr
    assert json.loads(run("lora", "--format", "json", cwd=folder).stdout)["verdict"] == "same"
    assert "two" in run("--list", cwd=folder).stdout


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no gates"),
        ("[tool.trace.gate.a]\nbaseline = 'a.h5'", "either command or path"),
        ("[tool.trace.gate.a]\nbaseline = 'a.h5'\ncommand = ['x']\npath = 'torch'", "either command or path"),
        ("[tool.trace.gate.a]\ncommand = ['x']", "no baseline"),
        ("[tool.trace.gate.a]\ncommand = 'x'\nbaseline = 'a.h5'", "list of texts"),
        ("[tool.trace.gate.a]\ncommand = ['x']\nbaseline = 'a.h5'\nconfig = 'c'", "goes with path"),
        ("[tool.trace.gate.a]\ncommand = ['x']\nbaseline = 'a.h5'\nspeed = 3", "unknown setting 'speed'"),
        ("[tool.trace.gate.a]\ncommand = ['x']\nbaseline = 'a.h5'\nsteps = '5:1'", "holds no step"),
        ("[tool.trace.gate.a]\ncommand = ['x']\nbaseline = 'a.h5'\nsteps = 'x'", "not a step"),
        ("[tool.trace.gate.a]\ncommand = ['x']\nbaseline = 'a.h5'\nfingerprint = 1", "true or false"),
        ("[tool.trace.gate]\na = 1", "not a table"),
        ("[tool.trace.gate.a\n", "not TOML"),
        (
            "[tool.trace.gate.a]\ncommand = ['x']\nbaseline = 'a.h5'\n[tool.trace.gate.b]\ncommand = ['x']\nbaseline = './a.h5'",
            "same baseline",
        ),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path: Path, text: str, word: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(BadConfig, match=word):
        load_gates(tmp_path / "pyproject.toml")


def test_a_built_in_path_becomes_options_of_record(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.trace.gate.a]\npath = 'torch'\nconfig = 'run.toml'\nset = ['train.steps=2']\nbaseline = 'a.h5'\nsteps = 2\n"
    )
    (tmp_path / "below").mkdir()
    gate = load_gates(find_project(tmp_path / "below"))["a"]
    assert gate.program == ("--path", "torch", "--config", "run.toml", "--set", "train.steps=2")
    assert gate.steps == (2, 2)
    assert gate.baseline == tmp_path.resolve() / "a.h5"


def test_a_file_that_is_no_trace_is_never_overwritten(folder: Path) -> None:
    (folder / "traces/lora.h5").write_text("precious")
    done = run("--update", cwd=project(folder))
    assert done.returncode == 2
    assert (folder / "traces/lora.h5").read_text() == "precious"


def test_a_damaged_baseline_is_no_answer_and_can_be_rewritten(folder: Path) -> None:
    path = folder / "traces/lora.h5"
    path.write_bytes(path.read_bytes()[:20_000])
    project(folder)
    assert run(cwd=folder).returncode == 2
    assert run("--update", cwd=folder).returncode == 1
    assert run(cwd=folder).returncode == 0


def test_update_sees_other_steps_as_a_change_even_where_nothing_diverged(tmp_path: Path) -> None:
    from differ.options import DiffOptions

    old = make_trace(tmp_path / "old.h5", steps=3)
    new = make_trace(tmp_path / "new.h5", steps=4)
    updated = baselines.update(old, new, DiffOptions(steps=(0, 3)))
    assert updated.why == "other steps are recorded"
    with open_trace(old) as trace:
        assert trace.last_step == 4


def test_a_missing_run_is_not_found(tmp_path: Path) -> None:
    from differ.options import DiffOptions

    with pytest.raises(NotFound):
        baselines.compare(tmp_path / "a.h5", tmp_path / "b.h5", DiffOptions())


def test_names_of_kept_files_are_safe_and_distinct() -> None:
    assert baselines.safe_name("lora") == "lora"
    assert baselines.safe_name("a/b") != baselines.safe_name("a:b")
    assert "/" not in baselines.safe_name("../../etc")
