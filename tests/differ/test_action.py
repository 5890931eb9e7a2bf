"""The composite action and the Mac workflow: the scripts in them are run, and what they refer to exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.builders import make_trace
from tests.differ.test_gate import project

ROOT = Path(__file__).parents[2]
yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")


def document(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / path).read_text())
    return loaded


def act(folder: Path, **inputs: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run the action's own script as the runner would: its defaults, these inputs, `bash -e -o pipefail`."""
    action = document("action.yml")
    given = {name: str(entry.get("default", "")) for name, entry in action["inputs"].items()} | inputs
    step = next(step for step in action["runs"]["steps"] if step.get("id") == "run")
    env = {
        key: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: given[m[1]], text) for key, text in step["env"].items()
    }
    files = {"GITHUB_OUTPUT": str(folder / "output"), "GITHUB_STEP_SUMMARY": str(folder / "summary")}
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]],
        capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **env, **files},
    )  # fmt: skip
    output = folder / "output"
    return done, output.read_text() if output.exists() else ""


def test_diff_annotates_sets_outputs_and_keeps_reports(tmp_path: Path) -> None:
    make_trace(tmp_path / "a.h5")
    make_trace(tmp_path / "b; echo hurt.h5", fault="lr")
    done, output = act(tmp_path, python=sys.executable, run="diff", a="a.h5", b="b; echo hurt.h5")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("DIVERGED at step 1, hparams")
    assert "::error title=DIVERGED" in done.stderr
    assert "diverged" in output
    assert "exit-code=1" in output
    assert "hparams" in (tmp_path / "trace-artifacts/diff.md").read_text()
    assert "\nhurt" not in done.stdout


def test_gate_runs_all_gates_or_those_that_are_named(tmp_path: Path) -> None:
    project(tmp_path)
    done, output = act(tmp_path, python=sys.executable)
    assert done.returncode == 2
    assert "trace gate --update lora" in done.stderr
    assert "exit-code=2" in output
    done, _ = act(tmp_path, python=sys.executable, gates="lora other")
    assert "there is no gate other" in done.stderr


def test_what_to_run_must_be_known(tmp_path: Path) -> None:
    done, output = act(tmp_path, python=sys.executable, run="dance")
    assert done.returncode == 2
    assert "exit-code=2" in output


def test_no_input_is_ever_part_of_a_script() -> None:
    scripts = [step["run"] for step in document("action.yml")["runs"]["steps"] if "run" in step]
    for job in document(".github/workflows/mac.yml")["jobs"].values():
        scripts += [step["run"] for step in job["steps"] if "run" in step]
    assert len(scripts) > 5
    assert not [script for script in scripts if "${{" in script]


def test_the_mac_workflow_runs_on_an_m1_one_known_path_a_job_and_compares_last() -> None:
    jobs = document(".github/workflows/mac.yml")["jobs"]
    assert {job["runs-on"] for job in jobs.values()} == {"macos-14"}
    paths = [arm["path"] for arm in jobs["arm"]["strategy"]["matrix"]["include"]]
    from scenarios.paths import PATHS

    assert set(paths) < set(PATHS)
    script = next(step["run"] for step in jobs["diff"]["steps"] if "Compare" in step.get("name", ""))
    assert all(path in script for path in paths)
    assert jobs["diff"]["needs"] == "arm"
    assert jobs["arm"]["needs"] == "reference"
