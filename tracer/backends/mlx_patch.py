"""Replace functions of a framework from outside, wherever they are held, and put them back.

`from mlx.core import compile` copies a reference: modules that were imported before recording began hold the original in
their own namespace, and are rebound too.  Invariant: after `undo` every name that was bound to an original is bound
to it again, also names that copied a replacement meanwhile.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from itertools import repeat
from operator import is_
from types import CellType, CodeType, FunctionType
from typing import Any


class Patches:
    """Attributes, module names and closure cells that were replaced."""

    def __init__(self) -> None:
        self._attributes: list[tuple[Any, str, Any]] = []
        self._replaced: dict[int, tuple[Any, Any]] = {}
        self._cells: list[tuple[CellType, Any]] = []
        self._methods: dict[tuple[type, str], tuple[Any, Any]] = {}

    def attribute(self, owner: Any, name: str, make: Callable[[Any], Any]) -> Any:
        """Replace `owner.name` by `make(original)`, and rebind modules that hold the original; returns the replacement.

        Does nothing if it is a replacement of ours already.
        """
        original = getattr(owner, name)
        if id(original) in self._replaced:
            return original
        known = next((new for old, new in self._replaced.values() if old is original), None)
        replacement = make(original) if known is None else known
        self._attributes.append((owner, name, original))
        setattr(owner, name, replacement)
        if not isinstance(owner, type) and known is None:
            self._replaced[id(replacement)] = (original, replacement)
            rebind(original, replacement)
        return replacement

    def method(self, kind: type, name: str, make: Callable[[Any], Any]) -> None:
        """Replace a method in the class that defines it, `kind` or one of its bases, once."""
        holder = next((each for each in kind.__mro__ if name in vars(each)), None)
        if holder is None or (holder, name) in self._methods:
            return
        original = vars(holder)[name]
        replacement = make(original)
        self._methods[holder, name] = (original, replacement)
        setattr(holder, name, replacement)

    def cell(self, cell: CellType, content: Any) -> None:
        """Replace the content of a closure cell."""
        self._cells.append((cell, cell.cell_contents))
        cell.cell_contents = content

    def undo(self) -> None:
        """Put everything back, last first."""
        for cell, content in reversed(self._cells):
            cell.cell_contents = content
        for (holder, name), (original, replacement) in reversed(self._methods.items()):
            # Where the program has replaced the method since, its own stays (mlx-lm's gradient checkpointing does that), and
            # what it calls in ours passes unchanged.
            if vars(holder).get(name) is replacement:
                setattr(holder, name, original)
        for owner, name, original in reversed(self._attributes):
            setattr(owner, name, original)
        for original, replacement in self._replaced.values():
            rebind(replacement, original)
        self._cells, self._attributes, self._replaced, self._methods = [], [], {}, {}


def rebind(old: Any, new: Any) -> None:
    """Bind every name of every imported module that refers to `old` to `new`."""
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", None)
        # Thousands of modules, nearly none of which has it: those are passed over without a loop of Python's own.
        if not isinstance(namespace, dict) or not any(map(is_, list(namespace.values()), repeat(old))):
            continue
        for name in [name for name, value in list(namespace.items()) if value is old]:
            namespace[name] = new


def inner_code(function: FunctionType, name: str) -> CodeType | None:
    """Code of the function `name` that is defined inside another."""
    constants = function.__code__.co_consts
    return next((c for c in constants if isinstance(c, CodeType) and c.co_name == name), None)


def functions_with_code(code: CodeType) -> Iterator[FunctionType]:
    """Live functions that were made from a piece of code."""
    for item in gc.get_objects():
        if type(item) is FunctionType and item.__code__ is code:
            yield item


def cell_of(function: FunctionType, name: str) -> CellType | None:
    """Closure cell of a free variable."""
    free = function.__code__.co_freevars
    return function.__closure__[free.index(name)] if function.__closure__ and name in free else None
