"""Annotations for GitHub Actions, a job summary and step outputs.

    ::error title=DIVERGED at step 1%2C grad::relative error 0.4 ...

The runner takes lines that begin with `::` as commands, so everything that comes from a file is escaped: `%`, CR and LF
in messages, `:` and `,` in properties too.  It shows ten annotations of a kind for a step; no more are made, and the last
one counts the rest.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from differ.reporters import Style, markdown, words
from differ.result import DiffResult, Verdict

SERIES: Final = True

MOST_ANNOTATIONS: Final = 10
LONGEST: Final = 4_000

SUMMARY: Final = "GITHUB_STEP_SUMMARY"
OUTPUT: Final = "GITHUB_OUTPUT"


def render(result: DiffResult, style: Style) -> str:  # noqa: ARG001 - a command is one line of any length
    """The annotations, a line each."""
    return "".join(f"{line}\n" for line in workflow_commands(result))


def workflow_commands(result: DiffResult) -> list[str]:
    """Workflow commands, at most MOST_ANNOTATIONS."""
    if result.verdict is Verdict.SAME:
        return [command("notice", "SAME", words.headline(result).removeprefix("SAME").strip())]
    if result.verdict is Verdict.INCOMPARABLE:
        reasons = "\n".join(note.summary for note in words.notes(result))
        return [command("error", "INCOMPARABLE", f"nothing was compared\n{reasons}".strip())]
    lines = list(_divergences(result))
    if len(lines) <= MOST_ANNOTATIONS:
        return lines
    kept = lines[: MOST_ANNOTATIONS - 1]
    rest = f"{len(lines) - len(kept):,} more are in the report"
    return [*kept, command("warning", "More divergences", rest)]


def _divergences(result: DiffResult) -> Iterator[str]:
    """The first finding with its causes; then one warning a phase of a step that diverged as well."""
    assert result.first is not None
    causes = [words.explained(cause, result.first) for cause in words.causes(result)]
    message = "\n".join([*causes, words.describe(result.first), words.nearest(result.first), words.before(result)])
    yield command("error", words.headline(result), message)
    for line in words.also(result):
        yield command("warning", "Also diverged", line)


def command(kind: str, title: str, message: str) -> str:
    """One workflow command; empty lines of the message are left out."""
    lines = "\n".join(words.one_line(line) for line in message.split("\n") if line)
    return f"::{kind} title={_property(words.one_line(title)[:LONGEST])}::{_data(lines[:LONGEST])}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def publish(result: DiffResult, environment: Mapping[str, str]) -> None:
    """Append the job summary and the step outputs `verdict` and `first`, where the runner names files for them.

    Raises OSError.
    """
    if path := environment.get(SUMMARY):
        _append(Path(path), markdown.render(result, Style()) + "\n")
    if path := environment.get(OUTPUT):
        first = "" if result.first is None else words.address(result.first)
        _append(Path(path), _output("verdict", result.verdict.value) + _output("first", first))


def _output(name: str, value: str) -> str:
    """One output; a delimiter that the value cannot contain keeps it from setting others."""
    end = f"end-{secrets.token_hex(16)}"
    return f"{name}<<{end}\n{words.one_line(value)}\n{end}\n"


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
