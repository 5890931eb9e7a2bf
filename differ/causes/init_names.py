"""`init.names`: the two sides train different sets of parameters: other layers, other modules, another rank.

Formula: the sets of trainable names at init, and the shapes of the LoRA factors that both have (`lora_A` [r, in],
`lora_B` [out, r]).  The share is 1: with the sets made equal, no finding about them is left.

Source: mlx-lm adapts the last 16 layers unless told otherwise, PEFT all (unsloth #5564); other target modules or another
rank in the adapter's configuration.
"""

from __future__ import annotations

import re
from typing import Any, Final

from differ.causes.context import Context
from differ.causes.words import listed, ranges
from differ.inputs import LORA_A, LORA_B
from differ.result import Cause
from tracer.schema import Phase

ID: Final = "init.names"

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_STRUCTURE: Final = ("missing_a", "missing_b", "state")
# Up to this many parameters on one side only are named one by one.
FEW: Final = 3


def find(context: Context) -> list[Cause]:
    """At most one cause for the sets and one for the ranks."""
    return [*_sets(context), *_ranks(context)]


def _sets(context: Context) -> list[Cause]:
    a, b = context.trainable("a"), context.trainable("b")
    found = {f.name for f in context.findings_in(Phase.INIT) if f.kind in _STRUCTURE and f.name is not None}
    names = tuple(sorted(a ^ b))
    if not names or not found & set(names):
        return []
    side = "b" if len(b) < len(a) else "a" if len(a) < len(b) else None
    parameters: dict[str, Any] = {"only_a": len(a - b), "only_b": len(b - a)}
    for key, of in (("layers", _layers), ("modules", _modules)):
        if of(a) != of(b):
            parameters |= {f"{key}_a": sorted(of(a)), f"{key}_b": sorted(of(b))}
    summary = _sentence(side or "a", a, b)
    return [Cause(ID, summary, side, 0, Phase.INIT.label, names, parameters, 1.0)]


def _sentence(side: str, a: frozenset[str], b: frozenset[str]) -> str:
    """In layers, if whole layers make the difference; else in modules; else the parameters themselves."""
    mine, other, them = (b, a, "a") if side == "b" else (a, b, "b")
    parts = [text for text in (_by_layers(side, mine, them, other), _by_modules(side, mine, them, other)) if text]
    if parts:
        return "; ".join(parts)
    if len(a ^ b) <= FEW:
        texts = [
            (f"{listed(sorted(only))} trained in {one} only") for one, only in (("a", a - b), ("b", b - a)) if only
        ]
        return "; ".join(texts)
    return f"{len(a - b):,} parameters are trained in a only, {len(b - a):,} in b only"


def _by_layers(side: str, mine: frozenset[str], them: str, other: frozenset[str]) -> str:
    here, there = _layers(mine), _layers(other)
    if here == there or not here or not there:
        return ""
    if here < there and there == set(range(max(there) + 1)):
        return f"{side} adapts layers {ranges(here)}, {them} all {len(there)}"
    return f"{side} adapts layers {ranges(here)}, {them} layers {ranges(there)}"


def _by_modules(side: str, mine: frozenset[str], them: str, other: frozenset[str]) -> str:
    here, there = _modules(mine), _modules(other)
    if here == there:
        return ""
    return (
        f"{side} adapts {', '.join(sorted(here)) or 'nothing'}; {them} adapts {', '.join(sorted(there)) or 'nothing'}"
    )


def _layers(names: frozenset[str]) -> set[int]:
    return {int(match[1]) for name in names if (match := _LAYER.search(name))}


def _modules(names: frozenset[str]) -> set[str]:
    return {_module(name).rpartition(".")[2] for name in names}


def _module(name: str) -> str:
    for suffix in (LORA_A, LORA_B, ".weight", ".bias"):
        name = name.removesuffix(suffix)
    return name


def _ranks(context: Context) -> list[Cause]:
    """LoRA factors that both sides have, of another rank."""
    a, b = context.row("a", Phase.INIT, 0), context.row("b", Phase.INIT, 0)
    found = {f.name for f in context.findings_in(Phase.INIT) if f.kind == "shape" and f.name is not None}
    if a is None or b is None:
        return []
    groups: dict[tuple[int, int], list[str]] = {}
    for name in sorted(found & set(a.positions) & set(b.positions)):
        ranks = _rank(name, a.shape(name)), _rank(name, b.shape(name))
        # The other dimension is the module's own; if that differs too, it is another module.
        if 0 not in ranks and ranks[0] != ranks[1] and _outer(name, a.shape(name)) == _outer(name, b.shape(name)):
            groups.setdefault(ranks, []).append(name)
    causes = []
    for (rank_a, rank_b), names in groups.items():
        modules = len({_module(name) for name in names})
        summary = f"LoRA rank {rank_a} in a, {rank_b} in b, in {modules:,} module{'' if modules == 1 else 's'}"
        parameters = {"rank_a": rank_a, "rank_b": rank_b}
        causes.append(Cause(ID, summary, None, 0, Phase.INIT.label, tuple(names), parameters, 1.0))
    return causes


def _rank(name: str, shape: tuple[int, ...]) -> int:
    if len(shape) != 2:
        return 0
    return shape[0] if name.endswith(LORA_A) else shape[1] if name.endswith(LORA_B) else 0


def _outer(name: str, shape: tuple[int, ...]) -> int:
    return shape[1] if name.endswith(LORA_A) else shape[0]
