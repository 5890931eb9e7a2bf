"""What a setting may be: checks that say in words what they allow, and return a value in its own type.

A check never guesses and never converts beyond an integer that is meant as a real number; what it does not allow is a
ValueError, and the caller names the place.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Protocol


class Check(Protocol):
    """What a setting may be: `allowed` says it in words, calling it returns the value or raises ValueError."""

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""

    def __call__(self, value: Any) -> Any:
        """The value in its own type; raises ValueError."""


@dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few values; the type counts too."""

    choices: tuple[Any, ...]

    @property
    def allowed(self) -> str:
        """In words."""
        return "one of " + ", ".join(json.dumps(choice) for choice in self.choices)

    def __call__(self, value: Any) -> Any:
        """The value; raises ValueError."""
        for choice in self.choices:  # `1 == True` in Python: the type counts too
            if type(choice) is type(value) and choice == value:
                return choice
        raise ValueError


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number."""

    low: int

    @property
    def allowed(self) -> str:
        """In words."""
        return f"a whole number from {self.low}"

    def __call__(self, value: Any) -> int:
        """The value; raises ValueError."""
        if type(value) is not int or value < self.low:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class Real:
    """A number in a range."""

    low: float
    below: float = math.inf
    open_at_low: bool = False

    @property
    def allowed(self) -> str:
        """In words."""
        start = f"above {self.low:g}" if self.open_at_low else f"from {self.low:g}"
        return f"a number {start}" + (f", below {self.below:g}" if self.below < math.inf else "")

    def __call__(self, value: Any) -> float:
        """The value; raises ValueError."""
        number = float(value) if type(value) in (int, float) else math.nan
        if not (self.low < number if self.open_at_low else self.low <= number) or not number < self.below:
            raise ValueError
        return number


@dataclass(frozen=True, slots=True)
class Text:
    """A string that is not empty."""

    words: str = "a non-empty string"

    @property
    def allowed(self) -> str:
        """In words."""
        return self.words

    def __call__(self, value: Any) -> str:
        """The value; raises ValueError."""
        if not isinstance(value, str) or not value:
            raise ValueError
        return value


@dataclass(frozen=True, slots=True)
class Many:
    """A list of items; or a word that stands for one."""

    item: Check
    size: int | None = None
    word: str | None = None  # a string that stands for a whole list, "linear"
    may_be_empty: bool = False

    @property
    def allowed(self) -> str:
        """In words."""
        size = f"{self.size} items" if self.size else "items"
        head = f"{json.dumps(self.word)} or " if self.word else ""
        empty = ", or []" if self.may_be_empty else ""
        return f"{head}a list of {size}, each {self.item.allowed}{empty}"

    def __call__(self, value: Any) -> Any:
        """The value; raises ValueError."""
        if self.word is not None and value == self.word:
            return self.word
        if not isinstance(value, list | tuple):
            raise ValueError
        if not value and self.may_be_empty:
            return ()
        if not value or (self.size is not None and len(value) != self.size):
            raise ValueError
        return tuple(self.item(item) for item in value)


@dataclass(frozen=True, slots=True)
class Either:
    """A word, or what another check takes."""

    word: str
    other: Check

    @property
    def allowed(self) -> str:
        """In words."""
        return f"{json.dumps(self.word)} or {self.other.allowed}"

    def __call__(self, value: Any) -> Any:
        """The value; raises ValueError."""
        return self.word if value == self.word else self.other(value)
