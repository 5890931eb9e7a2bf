"""What a planted fault is, and the runs that most of them are planted in.

A fault is a pair of arms, where the first finding must be, and which cause must come first.  `names` are globs over
parameters (or records) of the first finding's phase; the expected set is what they match among the records of that row
whose bits differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.bench.accuracy.arms import STEPS, Arm

SETTING, LOOP, EDIT, LIBRARY = "setting", "loop", "edit", "library"
NO_CAUSE: Final = ("-",)

BASE: Final[Mapping[str, Any]] = {"train.steps": STEPS}
EAGER: Final[Mapping[str, Any]] = {**BASE, "train.compile": False}
T: Final = Arm("torch", BASE)
M: Final = Arm("mlx", EAGER, source=T)
Q1B: Final = "model.layers.1.self_attn.q_proj.lora_B.weight"
D2A: Final = "model.layers.2.mlp.down_proj.lora_A.weight"
D2B: Final = "model.layers.2.mlp.down_proj.lora_B.weight"
ALL: Final = ("*",)
B: Final = ("*.lora_B.weight",)
A: Final = ("*.lora_A.weight",)
FACTORS: Final = (*A, *B)

ONE, SEVERAL, EVERY = "one", "several", "all"
# Of a fault's plan or settings, what says when and where it is planted, not how strong it is.
_WHERE: Final = frozenset(
    {
        "steps",
        "names",
        "module",
        "numbers",
        "element",
        "element_at",
        "reset_at",
        "flat",
        "seed",
        "from",
        "after",
        "micro",
    }
)
# Settings of both sides that say how strong a fault is which does not do what they say.
_DECLARED: Final = ("clip.", "optimizer.weight_decay")
_RECORDS_OF_NO_PARAMETER: Final = ("hparams", "batch", "loss")


@dataclass(frozen=True)
class Fault:
    """One planted fault.  `causes`: any of these may come first.  `reaches`: which parameters or modules the fault is planted
    in, where the names of the first finding do not say.
    """

    id: str
    how: str
    a: Arm
    b: Arm
    step: int
    phase: str
    names: tuple[str, ...]
    causes: tuple[str, ...]
    reaches: str = ""

    @property
    def family(self) -> str:
        """The cause that it is about."""
        return self.id.partition(":")[0]

    @property
    def scope(self) -> str:
        """`one`, `several` or `all` parameters or modules; empty for what belongs to none of them."""
        planted = [each["module"] for each in self.b.plan.get("forward", ())]
        if self.reaches or (self.phase in _RECORDS_OF_NO_PARAMETER and not planted):
            return self.reaches
        globs = tuple(planted) or self.names
        if globs in (ALL, A, B, FACTORS, ("*.lora_scale",)) or any(
            glob.startswith("model.layers.*.") for glob in planted
        ):
            return EVERY
        return ONE if len(globs) == 1 and "*" not in globs[0] else SEVERAL

    @property
    def form(self) -> str:
        """What is planted, and how strongly, whatever the step, the parameter and the framework."""
        if self.b.edit:
            return f"by {self.b.edit['by']}"
        settings = dict(self._changed(self.a.settings, self.b.settings))
        settings.pop("train.compile", None)
        settings |= {key: value for key, value in self.a.settings.items() if key.startswith(_DECLARED)}
        plans = {key: _strength(value) for key, value in self._changed(self.a.plan, self.b.plan)}
        where = {} if settings or plans else {"path": [self.a.path, self.b.path], **self.a.settings, **self.a.plan}
        return json.dumps({**settings, **plans, **where}, sort_keys=True)

    @staticmethod
    def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        return ((key, b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key))


def _strength(plan: Any) -> Any:
    if isinstance(plan, Mapping):
        return {key: _strength(value) for key, value in plan.items() if key not in _WHERE}
    return [_strength(each) for each in plan] if isinstance(plan, list) else plan


def pair(
    name: str,
    at: tuple[int, str],
    names: tuple[str, ...],
    *causes: str,
    a: Arm = T,
    b: Arm | None = None,
    how: str = LOOP,
    settings: Mapping[str, Any] | None = None,
    reaches: str = "",
    **plan: Any,
) -> Fault:
    """`b` is `a` with settings and plan unless it is given, and then that arm with them."""
    other = (b if b is not None else a).but(settings, **plan)
    return Fault(name, how, a, other, at[0], at[1], names, causes or (name.partition(":")[0],), reaches)
