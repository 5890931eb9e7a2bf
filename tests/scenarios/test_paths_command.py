"""`trace paths`: what works is what can be found, here and under another interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from scenarios import paths_command
from scenarios.paths import PATHS, PathInfo
from tracer.errors import BadUsage, NotFound
from tracer.interpreters import NEEDED, lent


def listed(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(paths_command.paths, arguments, standalone_mode=False)
    assert done.exception is None, done.exception
    return int(done.return_value), done.output


def test_every_path_is_listed_with_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathInfo, "missing", lambda self: ())
    code, text = listed()
    assert code == 0
    assert [line.split()[:2] for line in text.splitlines()[1:]] == [[name, "works"] for name in PATHS]


def test_without_any_library_every_line_says_what_is_missing_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PathInfo, "missing", lambda self: self.needs)
    code, text = listed("--json")
    found = json.loads(text)
    assert (code, found["format"]) == (2, 1)
    for path in found["paths"]:
        assert not path["works"]
        assert path["missing"] == list(PATHS[path["name"]].needs)
        assert path["fix"] == PATHS[path["name"]].fix
        assert path["versions"] == {}
    assert "needs torch, transformers, peft" in listed()[1]


def test_listing_imports_no_framework() -> None:
    program = (
        "import sys; from scenarios.paths_command import here, table; table(here()); "
        "print([n for n in ('torch', 'mlx', 'transformers', 'trl', 'unsloth_zoo') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Interpreter of an environment in which nothing is installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return str(folder / "bin" / "python")


def test_an_interpreter_without_what_the_recorder_needs_is_refused_with_the_command(bare: str) -> None:
    with pytest.raises(BadUsage) as error, lent(bare):
        pass
    assert f"{bare} -m pip install {' '.join(NEEDED)}" in error.value.line()


def test_another_interpreter_gets_this_project_and_nothing_else(
    bare: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tracer.interpreters.NEEDED", ())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import sys, tracer; print(sys.path[1:3]); import click"
    with lent(bare) as ours:
        done = subprocess.run([bare, "-c", program], capture_output=True, text=True, env=dict(ours))
        folder = Path(ours["PYTHONPATH"].split(":")[0])
        assert done.stdout.strip() == str([str(folder), str(tmp_path)])
        assert sorted(entry.name for entry in folder.iterdir()) == ["differ", "scenarios", "tracer"]
    assert "No module named 'click'" in done.stderr
    assert not folder.exists()


def test_what_is_no_interpreter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound), lent(tmp_path / "python"):
        pass
    false = tmp_path / "false"
    false.write_text("#!/bin/sh\nexit 1\n")
    false.chmod(0o755)
    with pytest.raises(BadUsage, match="does not run"), lent(false):
        pass


def test_our_own_interpreter_needs_nothing() -> None:
    with lent(sys.executable) as ours, lent(None) as nothing:
        assert ours == nothing == {}


def test_another_environment_lists_its_own_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    link = tmp_path / "python"
    link.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    link.chmod(0o755)

    def without_times(found: dict[str, Any]) -> list[tuple[str, bool]]:
        return [(path["name"], path["works"]) for path in found["paths"]]

    assert without_times(json.loads(listed("--json", "--python", str(link))[1])) == without_times(paths_command.here())
