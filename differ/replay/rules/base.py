"""What a rule of an optimizer is: the settings and recorded values that it may look at, and the questions it answers.

A family (Adam, Lion …) is one class in a module of its own.  It says which kinds of state it keeps, which rules it knows, and
what each rule makes of recorded inputs, in float64.  It never sees the other side, a class name, or a switch that the
numbers do not bear out.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

import numpy as np

from differ.align import BLOCK, Tensor
from differ.compare import Float64

# A rule is a set of choices by aspect, as sorted pairs: (("correction", "yes"), ("decay", "none"), ("eps", "outside")).
Rule = tuple[tuple[str, str], ...]
Choices = Mapping[str, str]

# The aspect that names the family of a rule.
OPTIMIZER: Final = "optimizer"
# What state shows of decay: none, or decay that is added to the gradient.
ADDED: Final = ("none", "coupled")


def rule(**choices: str) -> Rule:
    """A rule from its choices."""
    return tuple(sorted(choices.items()))


def rules(optimizer: str, **aspects: tuple[str, ...]) -> tuple[Rule, ...]:
    """All combinations of the choices of some aspects; the last aspect changes fastest."""
    found = itertools.product(*aspects.values())
    return tuple(rule(optimizer=optimizer, **dict(zip(aspects, values, strict=True))) for values in found)


def differing_aspects(a: Rule, b: Rule) -> frozenset[str]:
    """Aspects in which two rules differ; between two families that is the family alone."""
    one, other = dict(a), dict(b)
    if one.get(OPTIMIZER) != other.get(OPTIMIZER):
        return frozenset({OPTIMIZER})
    return frozenset(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


@dataclass(frozen=True, slots=True)
class Hyper:
    """Settings of one parameter's group at one step; `step` counts the optimizer's updates, this one included.

    `more` holds the numbers that only some rules have, under their recorded names (`alpha`, `rho`, `eps2` …).  A learning rate
    that is not recorded is nan, and a rule that needs one then fits nothing.
    """

    lr: float
    step: int
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    more: Mapping[str, float] = field(default_factory=dict)

    def get(self, key: str, default: float = 0.0) -> float:
        """A setting of `more`."""
        return self.more.get(key, default)


class Held(Protocol):
    """What one trace holds of one parameter around one update; each tensor is read when it is asked for, once."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of float state that are recorded of the parameter after this update."""

    @property
    def gradient(self) -> Tensor | None:
        """The clipped gradient."""

    @property
    def parameter(self) -> Tensor | None:
        """The parameter before this update."""

    def state(self, kind: str) -> Tensor | None:
        """State after this update."""

    def earlier(self, kind: str) -> Tensor | None:
        """State before this update; before the first one what an optimizer starts from."""

    def remember(self, key: object, compute: Callable[[], Any]) -> Any:
        """A derived value, computed once; only the last few are kept."""


@dataclass(frozen=True)
class Replayed:
    """What a rule is given: the recorded output and what it was before, the settings, and everything else on request.

    `rules` are those that such state and settings leave possible.  For an update the output is the parameter, for a moment
    the state of that `kind`.
    """

    before: Tensor
    after: Tensor
    hyper: Hyper
    held: Held
    rules: tuple[Rule, ...] = ()
    kind: str = ""

    @property
    def gradient(self) -> Tensor:
        """The clipped gradient; raises Lacking where it was not recorded."""
        return given(self.held.gradient)

    def g(self, start: int, choices: Choices) -> Float64:
        """One block of the gradient, which has the output's elements, coupled decay added."""
        return self._decayed(self._alike(self.gradient, self.after), start, choices)

    def whole_g(self, choices: Choices) -> Float64:
        """The whole gradient in its shape, coupled decay added."""
        parts = [self._decayed(self.gradient, start, choices) for start in self.gradient.blocks()]
        return np.concatenate(parts).reshape(self.gradient.shape) if parts else np.zeros(self.gradient.shape)

    def state(self, kind: str, start: int) -> Float64:
        """One block of state after the update, which has the output's elements."""
        return self._alike(given(self.held.state(kind)), self.after).block(start, start + BLOCK)

    def earlier(self, kind: str, start: int) -> Float64:
        """One block of state before the update, which has the output's elements."""
        return self._alike(given(self.held.earlier(kind)), self.after).block(start, start + BLOCK)

    def _decayed(self, gradient: Tensor, start: int, choices: Choices) -> Float64:
        g = gradient.block(start, start + BLOCK)
        if choices.get("decay") == "coupled" and self.hyper.weight_decay:
            parameter = self._alike(given(self.held.parameter), gradient)
            g = g + self.hyper.weight_decay * parameter.block(start, start + BLOCK)
        return g

    @staticmethod
    def _alike(tensor: Tensor, other: Tensor) -> Tensor:
        if tensor.size != other.size:
            raise Lacking
        return tensor


class Lacking(LookupError):
    """A rule asked for something that the trace does not hold, or holds in another shape."""


# What a rule that says nothing of its inputs ends with: a beta of 1 is a division by zero.
UNUSABLE: Final = (Lacking, ArithmeticError)


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that has to be there; raises Lacking."""
    if tensor is None:
        raise Lacking
    return tensor


def whole(tensor: Tensor) -> Float64:
    """All elements as float64, in shape."""
    return tensor.block(0, tensor.size).reshape(tensor.shape)


def rms(values: Float64) -> float:
    """Root of the mean square; 0 of nothing."""
    return math.sqrt(float(np.mean(np.square(values)))) if values.size else 0.0


class Family(abc.ABC):
    """Rules of one optimizer and its variants."""

    name: ClassVar[str]
    # Rules of the update, the usual ones first, and of each kind of state.
    updates: ClassVar[tuple[Rule, ...]]
    moments: ClassVar[Mapping[str, tuple[Rule, ...]]]
    # Whether a rule treats every element by itself, so that tensors may be put end to end.
    elementwise: ClassVar[bool] = True
    # Words for a report, for each choice that no other family has words for.
    words: ClassVar[Mapping[tuple[str, str], str]]

    @abc.abstractmethod
    def keeps(self, kinds: frozenset[str], hyper: Hyper) -> bool:
        """Whether this optimizer keeps these kinds of state under such settings."""

    @abc.abstractmethod
    def update(self, inputs: Replayed, choices: Choices, start: int, w: Float64) -> Float64:
        """What the rule subtracts from the block of the parameter at `start`, `w` before, decoupled decay aside."""

    def decay(self, inputs: Replayed, choices: Choices) -> float:
        """Share of the weights that decoupled decay takes away."""
        return inputs.hyper.lr * inputs.hyper.weight_decay if choices["decay"] == "decoupled" else 0.0

    def slack(self, inputs: Replayed, choices: Choices, start: int, update: Float64) -> Float64 | float:
        """What a block of the update may be off by, beside the rounding of any rule."""
        del inputs, choices, start, update
        return 0.0

    def length(self, choices: Choices) -> float | None:
        """Relative error that the length of an update may have, where its elements are too noisy to be judged one by one."""
        del choices
        return None

    def closer(self, choices: Choices) -> Rule | None:
        """Of a rule with a `length`: the like rule whose elements are judged one by one."""
        del choices
        return None

    @abc.abstractmethod
    def moment(self, inputs: Replayed, choices: Choices, start: int) -> tuple[Float64, Float64]:
        """What the rule keeps of a block of the state before, and what it adds to it."""
