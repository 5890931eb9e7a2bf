"""The documented layout is the one in the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.tracer.test_file import write
from tracer.format_page import page

PAGE = Path(__file__).parents[2] / "docs" / "format.md"


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == page(), "run: python -m tracer.format_page > docs/format.md"


def test_the_example_on_the_page_runs(tmp_path: Path) -> None:
    write(tmp_path / "run.h5")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("p0 float32 ")
