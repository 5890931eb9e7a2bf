"""The README's transcript is what the demonstration prints, and every command in it exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.scenarios.conftest import needs_mlx, needs_torch
from tracer.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@needs_torch
@needs_mlx
def test_the_demonstration_prints_what_the_readme_shows(tmp_path: Path) -> None:
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, "-m", "scenarios.demo", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    # The last digits of a value, and which record came nearest to its tolerance, may be others on another processor.
    numbers = re.compile(r"-?\d+\.\d{4,}|worst \S+ of tolerance at step \d+ \w+|[\d,]+ same bits")
    printed = numbers.sub("#", done.stdout)
    lines = [numbers.sub("#", line) for line in shown.splitlines() if line.strip() != "…"]
    assert len(lines) > 10
    assert [line for line in lines if line not in printed] == []


def test_every_command_of_the_readme_exists() -> None:
    commands = set(re.findall(r"(?:\$ |`)trace ([a-z]+)", README))
    assert commands >= {"record", "diff", "show", "check", "selftest", "gate"}
    assert commands <= set(COMMANDS)


def test_every_page_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 6
    assert [link for link in links if not (ROOT / link).exists()] == []
