"""The report for a terminal: the verdict first, then why, what agrees before, what else is independent, what to know.

    DIVERGED at step 1, clipped_grad, model.layers.4.mlp.down_proj.lora_B.weight           a: mlx-lm   b: hf-trainer
      cause    b adapts layers 2–17, a all 18
      ...

Renders a `DiffResult` and computes nothing but line breaks; the sentences are those of `words`.  At most about 25 lines:
what is left out is counted.  Names are never broken, nor are a number and its word, nor an index.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from differ.reporters import Style, words
from differ.result import DiffResult, Verdict

INDENT: Final = 2
LABEL: Final = 9
# Lines that are longer are hard to read, however wide the window.
WIDEST: Final = 120
NARROWEST: Final = 40
# How many of each a report shows; the rest is counted.
MOST_CAUSES: Final = 8
MOST_ALSO: Final = 5
MOST_SETTINGS: Final = 4
MOST_NOTES: Final = 4

# Words between which a line must not be broken: a number and its unit, a side and its value, an index, a remark.
_HELD: Final = re.compile(
    r"\[[^\[\]]{0,30}\]|\((?:explains|tolerance|and|\d[\d,.]*) [^()]*\)|\b\d[\d,.]* [a-z%]|\b[ab]:? \S+"
)
_HOLD: Final = "\x1f"


def render(result: DiffResult, style: Style) -> str:
    """The report as text, with a newline at the end."""
    width = max(NARROWEST, min(style.width, WIDEST))
    lines = [*_head(result, width), *_body(result, width)]
    if style.colour:
        lines[0] = _coloured(lines[0], result.verdict)
    return "\n".join(lines) + "\n"


def _coloured(line: str, verdict: Verdict) -> str:
    """The verdict's word in colour.  Rich is imported here, so that a pipe never pays for it."""
    import io

    from rich.console import Console
    from rich.text import Text

    word, space, rest = line.partition(" ")
    colour = {Verdict.SAME: "bold green", Verdict.DIVERGED: "bold red", Verdict.INCOMPARABLE: "bold yellow"}[verdict]
    text = Text.assemble((word, colour), space + rest)
    console = Console(file=io.StringIO(), force_terminal=True, width=max(len(line), 1), highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(text, end="")
    return capture.get()


def _head(result: DiffResult, width: int) -> list[str]:
    """First line; the names of the sides go to its right end if there is room, else to a line of their own."""
    line = words.one_line(words.headline(result))
    sides = words.one_line(f"a: {result.a.label}   b: {result.b.label}")
    if len(line) + 3 + len(sides) <= width:
        return [line + " " * (width - len(line) - len(sides)) + sides]
    return [*_wrapped(line, width, "", " " * INDENT), *_line("runs", sides, width)]


def _body(result: DiffResult, width: int) -> Iterator[str]:
    causes = [words.explained(cause, result.first) for cause in words.causes(result)]
    yield from _some("cause", causes, MOST_CAUSES, "cause", width)
    if result.first is not None:
        yield from _line("found", words.describe(result.first), width)
        if result.first.nearest:
            yield from _line("", words.nearest(result.first), width)
    if result.verdict is Verdict.SAME and result.worst is not None and result.counts.within:
        yield from _line("worst", result.worst.name, width)
    for told in words.reference(result):
        yield from _line("verify", told, width)
    agreed = words.before(result)
    if agreed:
        yield from _line("before", agreed, width)
    yield from _some("also", words.also(result), MOST_ALSO, "finding", width)
    settings = [cause.summary for cause in words.settings(result)]
    yield from _some("config", settings, MOST_SETTINGS, "setting", width)
    yield from _some("note", [cause.summary for cause in words.notes(result)], MOST_NOTES, "note", width)
    if words.tells_counts(result):
        yield from _line("counts", words.counts(result), width)


def _some(label: str, lines: Sequence[str], most: int, what: str, width: int) -> Iterator[str]:
    """The first lines, each with its label so that a wrapped one is told from the next, and how many more there are."""
    for line in lines[:most]:
        yield from _line(label, line, width)
    if len(lines) > most:
        yield from _line(label, f"… {words.plural(len(lines) - most, f'more {what}')}", width)


def _line(label: str, text: str, width: int) -> list[str]:
    """`  label    text`, wrapped under its own beginning."""
    head = " " * INDENT + label.ljust(LABEL)
    return _wrapped(words.one_line(text), width, head, " " * len(head))


def _wrapped(text: str, width: int, first: str, later: str) -> list[str]:
    room = width - len(later)
    held = _HELD.sub(lambda found: found[0].replace(" ", _HOLD) if len(found[0]) <= room else found[0], text)
    lines = textwrap.wrap(
        held, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
    return [line.replace(_HOLD, " ") for line in lines]
