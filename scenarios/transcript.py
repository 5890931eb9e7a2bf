"""`python -m scenarios.transcript PAGE.md …`: run the commands of a page again and write down what they print.

In a ```console block every line that begins with `$ ` is run by a shell, in order, in one temporary folder a page; what it
prints replaces the lines below it, all of it or the first ones (`$ command  # 5 lines`).  Everything else stays.  Invariant: what
a page shows was printed by the command above it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# How many lines of the output a page shows.
_LINES: Final = re.compile(r"\s+# (\d+) lines?$")
_WIDTH: Final = 110


def refresh(text: str, folder: Path) -> str:
    """The page with its console blocks run again in `folder`."""
    lines, out = iter(text.splitlines()), list[str]()
    for line in lines:
        out.append(line)
        if line.strip() == "```console":
            out += _block(_until_fence(lines), folder)
            out.append("```")
    return "\n".join(out) + "\n"


def _until_fence(lines: Iterator[str]) -> list[str]:
    block: list[str] = []
    for line in lines:
        if line.strip() == "```":
            return block
        block.append(line)
    raise ValueError("a console block has no end")


def _block(lines: list[str], folder: Path) -> Iterator[str]:
    for line in lines:
        if line.startswith("$ "):
            yield line
            yield from _run(line.removeprefix("$ "), folder)


def _run(command: str, folder: Path) -> list[str]:
    """What a command prints.  Raises RuntimeError for an exit code other than 0 and 1: a page shows no command that failed."""
    limit = _LINES.search(command)
    here = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}", "COLUMNS": str(_WIDTH)}
    done = subprocess.run(
        _LINES.sub("", command), shell=True, cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise RuntimeError(f"`{command}` ended with exit code {done.returncode}:\n{done.stdout}")
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    if limit is None or len(printed) <= int(limit[1]):
        return printed
    return [*printed[: int(limit[1])], "…"]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        with tempfile.TemporaryDirectory(prefix="trace-page-") as temporary:
            page.write_text(refresh(page.read_text("utf-8"), Path(temporary)), "utf-8")
