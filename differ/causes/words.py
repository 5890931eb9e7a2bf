"""Numbers and lists as a summary prints them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
# Names that a sentence lists; more are counted.
_LISTED: Final = 2


def number(value: float, digits: int = 6) -> str:
    """A number with so many significant digits: `2`, `0.998047`, `-1.5e-07`."""
    return f"{value:.{digits}g}"


def count(things: int, word: str, plural: str = "") -> str:
    """`1 row`, `3 rows`."""
    return f"{things:,} {word if things == 1 else plural or word + 's'}"


def ranges(numbers: Iterable[int]) -> str:
    """`0–3, 7` of {0, 1, 2, 3, 7}."""
    parts: list[list[int]] = []
    for value in sorted(set(numbers)):
        if parts and value == parts[-1][-1] + 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def listed(names: Iterable[str], most: int = 4) -> str:
    """`x, y, z and 3 more`."""
    found = list(names)
    more = f" and {len(found) - most:,} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def which(names: Sequence[str], total: int) -> str:
    """Parameters: their names if they are few, else how many of how many and in which layers."""
    if len(names) <= _LISTED:
        return ", ".join(names)
    layers = {int(match[1]) for name in names if (match := _LAYER.search(name))}
    where = f" in layers {ranges(layers)}" if layers else ""
    return f"{len(names):,} of {total:,} parameters{where}"
