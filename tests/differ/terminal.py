"""Stand-ins for what a command's streams lead to: a real terminal, and a pipe whose reader has gone."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO
from unittest.mock import patch

import pytest

from tracer.cli.main import main

CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|[\r\n]|[^\x1b\r\n]+")


class Terminal:
    """A pseudo-terminal of 80 columns: `slave` is what a program writes to, `said()` all that it wrote."""

    def __init__(self, columns: int = 80) -> None:
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._parts: list[bytes] = []
        self._arrived = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            part = b""
            with contextlib.suppress(OSError):  # Linux's way of saying that the last writer has closed it
                part = os.read(self._master, 65_536)
            with self._arrived:
                self._parts.append(part)
                self._arrived.notify_all()
            if not part:
                return

    def type(self, text: str) -> None:
        """Type on its keyboard."""
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Until a text has been written to it."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: text.encode() in b"".join(self._parts), seconds), self._parts

    def close_slave(self) -> None:
        """Leave it to the programs that have it."""
        if self.slave >= 0:
            os.close(self.slave)
        self.slave = -1

    def said(self) -> str:
        """All that was written, once every writer has closed it."""
        self.close_slave()
        self._thread.join(60)
        assert not self._thread.is_alive()
        return b"".join(self._parts).decode()

    def close(self) -> None:
        """Give it back."""
        self.said()
        os.close(self._master)


@contextlib.contextmanager
def terminal(columns: int = 80) -> Iterator[Terminal]:
    """A terminal for the length of a block."""
    opened = Terminal(columns)
    try:
        yield opened
    finally:
        opened.close()


def screen(said: str) -> list[str]:
    """What is to be seen at the end: lines without colour, after cursor movements and erasures; no empty ones."""
    lines, row, column = [""], 0, 0
    for found in CONTROL.finditer(said):
        text, amount, command = found[0], found[1], found[2]
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif command == "A":
            row = max(0, row - int(amount or 1))
        elif command == "K":
            lines[row] = lines[row][:column] if amount != "2" else ""
        elif command is None:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


@contextlib.contextmanager
def deaf() -> Iterator[TextIO]:
    """A stream into a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


def run(*arguments: object, stdout: TextIO, stderr: TextIO, cwd: Path | None = None, **env: str) -> int:
    """`trace …` in this process; its exit code."""
    bare = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    with contextlib.ExitStack() as stack:
        if cwd is not None:
            stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(patch.dict(os.environ, {**bare, "TERM": "xterm-256color", **env}, clear=True))
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        stop = stack.enter_context(pytest.raises(SystemExit))
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def heard(*arguments: object, cwd: Path | None = None, **env: str) -> tuple[int, str, str]:
    """`trace …` in this process, into pipes: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    return run(*arguments, stdout=out, stderr=err, cwd=cwd, **env), out.getvalue(), err.getvalue()


def seen(*arguments: object, columns: int = 80, **env: str) -> tuple[int, str, str]:
    """`trace …` in this process, with a terminal each for stdout and stderr: exit code, what each was told."""
    with terminal(columns) as first, terminal(columns) as second:
        with os.fdopen(os.dup(first.slave), "w") as out, os.fdopen(os.dup(second.slave), "w") as err:
            code = run(*arguments, stdout=out, stderr=err, **env)
        return code, first.said(), second.said()
