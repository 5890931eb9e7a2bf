"""Canonical names: those of the Hugging Face checkpoint, LoRA factors as PEFT saves them.

    torch/PEFT  base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight   [r, in]
    mlx-lm                       model.layers.3.self_attn.q_proj.lora_a                   [in, r]
    canonical                    model.layers.3.self_attn.q_proj.lora_A.weight            [r, in]

A rule is a regex, its replacement and whether the tensor is transposed.  Rules are tried in order and each is applied
once; a user's own (`[tool.trace.names]`) come first.  Invariant: a canonical name is a fixed point.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

TRANSPOSED: Final = "T"


@dataclass(frozen=True, slots=True)
class Rule:
    """One renaming: where `pattern` is found it becomes `replacement`; `transpose` swaps the last two axes."""

    pattern: re.Pattern[str]
    replacement: str
    transpose: bool = False


def _rule(pattern: str, replacement: str, transpose: bool = False) -> Rule:
    return Rule(re.compile(pattern), replacement, transpose)


@cache
def built_in() -> tuple[Rule, ...]:
    """The rules for what frameworks and their wrappers call things; compiled when the first name is mapped."""
    return (
        # Wrappers around a model: torch.compile, DDP, PEFT.
        _rule(r"(?:^|(?<=\.))_orig_mod\.", ""),
        _rule(r"^(?:module\.)+", ""),
        _rule(r"^base_model\.model\.", ""),
        # PEFT puts the adapter's name between the factor and `weight`.
        _rule(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.([^.]+)\.weight$", r".\1.weight"),
        _rule(r"\.(lora_embedding_[AB])\.([^.]+)$", r".\1.weight"),
        _rule(r"\.base_layer\.(weight|bias)$", r".\1"),
        # A whole module that PEFT trains in a copy; the frozen one is then `original_module`.
        _rule(r"\.modules_to_save\.[^.]+\.(\w+)$", r".\1"),
        # mlx-lm keeps LoRA factors as [in, r] and [r, out].
        _rule(r"\.lora_a$", ".lora_A.weight", transpose=True),
        _rule(r"\.lora_b$", ".lora_B.weight", transpose=True),
        # mlx-lm's name for DoRA's magnitudes.
        _rule(r"_proj\.m$", "_proj.lora_magnitude_vector.weight"),
        # mlx-lm wraps the frozen layer as `linear` (or `embedding`).
        _rule(r"_proj\.linear\.(\w+)$", r"_proj.\1"),
        _rule(r"\.(embed_tokens|lm_head)\.(?:embedding|linear)\.(\w+)$", r".\1.\2"),
        # The same wrappers as modules: what is inside a LoRA layer is its base layer.
        _rule(r"(_proj|\.embed_tokens|(?:^|\.)lm_head)\.(?:linear|embedding)$", r"\1.base_layer"),
        # The dropout before a LoRA layer's factors, as PEFT and as mlx-lm keep it.
        _rule(r"\.lora_dropout\.[^.]+$", ".lora_dropout"),
        _rule(r"(_proj|\.embed_tokens|(?:^|\.)lm_head)\.dropout$", r"\1.lora_dropout"),
        # Multimodal Gemma-3 under mlx-lm against transformers.
        _rule(r"^language_model\.model\.", "model.language_model."),
    )


# Last parts of the names of modules whose outputs say nothing that those around them do not: activations, dropouts, tables of
# angles, the factors inside a LoRA layer, and wrappers around a whole model.
_UNUSUAL: Final = (
    r"(^|\.)(act|act_fn|activation\w*|gelu|silu|relu|softmax|\w*dropout\w*|rotary_emb\w*|rope\w*|lora_\w+|modules_to_save|original_module)(\.|$)"
    r"|^(|model|language_model|transformer|base_model|base_model\.model|module|_orig_mod|model\.language_model)$"
)
# `…q_proj.lora_delta`: the output of a LoRA layer less that of its base layer.
LORA_DELTA: Final = ".lora_delta"
# `…q_proj.lora_dropout`: what a LoRA layer's dropout leaves of its input; recorded where there is such a dropout.
LORA_DROPOUT: Final = ".lora_dropout"
BASE_LAYER: Final = ".base_layer"


def is_usual_module(name: str) -> bool:
    """Whether the output of a module (canonical name) is recorded without being asked for: embeddings, norms, attention, mlp,
    projections, layers, the head, and what LoRA adds to one of them and drops of its input."""
    return re.search(_UNUSUAL, name.removesuffix(LORA_DELTA).removesuffix(LORA_DROPOUT)) is None


@dataclass(frozen=True, slots=True)
class Canonical:
    """A canonical name and how to bring the tensor into canonical layout ("" or "T")."""

    name: str
    transform: str


# A tensor of a PEFT adapter, with the adapter's name, which a canonical name does not have.
_ADAPTER: Final = (
    r"\.lora_\w+\.(?!weight$)(?P<of_factor>[^.]+)(?:\.weight)?$|\.modules_to_save\.(?P<of_copy>[^.]+)\.\w+$"
)


class NameMap:
    """Original name -> canonical name.  Remembers its answers: a run asks for the same names at every step.

    Canonical names have no adapter's name, so of several adapters in one model the first has the canonical name, and the others
    `<canonical>#<adapter>`.
    """

    def __init__(self, extra: Iterable[Rule] = ()) -> None:
        self.rules: tuple[Rule, ...] = (*extra, *built_in())
        self._known: dict[str, Canonical] = {}
        self._adapters: dict[str, str] = {}

    def __call__(self, original: str) -> Canonical:
        """Canonical name of an original one."""
        known = self._known.get(original)
        if known is None:
            known = self._known[original] = self._of_one_adapter(original, apply_rules(original, self.rules))
        return known

    def _of_one_adapter(self, original: str, canonical: Canonical) -> Canonical:
        found = re.search(_ADAPTER, original)
        if found is None:
            return canonical
        adapter = found["of_factor"] or found["of_copy"]
        if self._adapters.setdefault(canonical.name, adapter) == adapter:
            return canonical
        return Canonical(f"{canonical.name}#{adapter}", canonical.transform)


def apply_rules(original: str, rules: Sequence[Rule]) -> Canonical:
    """Apply each rule once, in order."""
    name, transposed = original, False
    for rule in rules:
        name, hits = rule.pattern.subn(rule.replacement, name)
        transposed ^= rule.transpose and hits > 0
    return Canonical(name, TRANSPOSED if transposed else "")


def parse_rules(table: dict[str, object]) -> tuple[Rule, ...]:
    """Rules of a `[tool.trace.names]` table.

    `"regex" = "replacement"` or `"regex" = { to = "replacement", transpose = true }`.  Raises ValueError that
    names the entry.
    """
    rules = []
    for pattern, target in table.items():
        to = target.get("to") if isinstance(target, dict) else target
        transpose = bool(target.get("transpose", False)) if isinstance(target, dict) else False
        if not isinstance(to, str):
            raise ValueError(f"name rule {pattern!r} needs a replacement string, or {{to = …, transpose = …}}")
        try:
            rules.append(Rule(re.compile(pattern), to, transpose))
        except re.error as error:
            raise ValueError(f"name rule {pattern!r} is not a regular expression: {error}") from error
    return tuple(rules)


@cache
def state_name(parameter: str, kind: str) -> str:
    """Name of an optimizer-state record: the parameter's name, a slash, the kind (`exp_avg`)."""
    return f"{parameter}/{kind}"


def split_state_name(name: str) -> tuple[str, str]:
    """Inverse of `state_name`; a state of the whole optimizer (`step`) has an empty parameter."""
    parameter, _, kind = name.rpartition("/")
    return parameter, kind


def nearest(name: str, known: Iterable[str], count: int = 3, cutoff: float = 0.6) -> list[str]:
    """The known names that are most like a name, best first; for messages, never for matching."""
    import difflib  # slow to import, and needed only for a name without a counterpart

    return difflib.get_close_matches(name, list(known), count, cutoff)
