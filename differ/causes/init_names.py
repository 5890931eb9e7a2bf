"""`init.names`: the two sides train different sets of parameters; says which layers or modules."""

from __future__ import annotations

import re
from typing import Final

from differ.causes.context import Context
from differ.inputs import LORA_A, LORA_B
from differ.result import Cause

ID: Final = "init.names"

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def find(context: Context) -> list[Cause]:
    """At most one cause."""
    a, b = context.trainable("a"), context.trainable("b")
    missing = any(
        finding.phase == "init" and finding.kind in ("missing_a", "missing_b") for finding in context.findings
    )
    if a == b or not missing:
        return []
    names = sorted(a ^ b)
    side = "b" if len(b) < len(a) else "a"
    mine, other, them = (b, a, "a") if side == "b" else (a, b, "b")
    summary = _layers(side, mine, them, other) or _modules(side, mine, them, other) or _count(a, b)
    parameters = {"only_a": len(a - b), "only_b": len(b - a)}
    return [Cause(ID, summary, side=side, step=0, phase="init", names=tuple(names), parameters=parameters)]


def _layers(side: str, mine: frozenset[str], them: str, other: frozenset[str]) -> str:
    """Where the sets differ by whole layers."""
    here, there = _layer_numbers(mine), _layer_numbers(other)
    if here == there or not here or not there:
        return ""
    if here < there and there == set(range(max(there) + 1)):
        return f"{side} adapts layers {_ranges(here)}, {them} all {len(there)}"
    return f"{side} adapts layers {_ranges(here)}, {them} layers {_ranges(there)}"


def _modules(side: str, mine: frozenset[str], them: str, other: frozenset[str]) -> str:
    """Where they differ by the kinds of modules."""
    here, there = _module_names(mine), _module_names(other)
    if here == there:
        return ""
    return (
        f"{side} adapts {', '.join(sorted(here)) or 'nothing'}; {them} adapts {', '.join(sorted(there)) or 'nothing'}"
    )


def _count(a: frozenset[str], b: frozenset[str]) -> str:
    return f"{len(a - b):,} parameters are trained in a only, {len(b - a):,} in b only"


def _layer_numbers(names: frozenset[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := _LAYER.search(name))}


def _module_names(names: frozenset[str]) -> set[str]:
    stems = {
        name.removesuffix(LORA_A).removesuffix(LORA_B).removesuffix(".weight").removesuffix(".bias") for name in names
    }
    return {stem.rpartition(".")[2] for stem in stems}


def _ranges(numbers: set[int]) -> str:
    """`0–3, 7` of {0, 1, 2, 3, 7}."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}–{part[-1]}" for part in parts)
