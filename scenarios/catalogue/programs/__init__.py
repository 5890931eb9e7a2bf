"""Training programs that have one known bug each, for what no setting of a training path makes.

A program is a module with `NEEDS`, the packages that it imports when it runs, and `run(config, feed, **options)`: an ordinary
training loop in real framework code that knows nothing of the recorder.  Its options choose between the right way and
the wrong one; they are not declared, so a diff has only the numbers to go by.

`BESIDE` names the path in whose process it may be recorded, where it leaves nothing behind that could change another run (hooks,
replaced functions, flags of the framework); without it, a program has a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Final, Protocol, cast

from scenarios.config import RunConfig
from scenarios.feed import Feed

TORCH: Final = ("torch", "transformers", "peft", "safetensors", "tokenizers")
MLX: Final = ("mlx", "mlx_lm", "safetensors", "tokenizers")


class Program(Protocol):
    """Module of a program."""

    NEEDS: tuple[str, ...]

    def run(self, config: RunConfig, feed: Feed, **options: object) -> None:
        """Train as configured, with or without the bug."""


# Modules here that programs share.
_SHARED: Final = ("__init__", "adamw", "loops")


def names() -> tuple[str, ...]:
    """All programs."""
    found = sorted(file.stem for file in Path(__file__).parent.glob("*.py"))
    return tuple(name for name in found if name not in _SHARED)


def program(name: str) -> Program:
    """A program by name; importing it imports no framework."""
    return cast(Program, importlib.import_module(f"{__name__}.{name}"))


def beside(name: str) -> str | None:
    """The path whose process a program may share; None if it has one of its own."""
    return getattr(program(name), "BESIDE", None)


def missing(name: str) -> tuple[str, ...]:
    """Packages that a program needs and that are not installed."""
    return tuple(package for package in program(name).NEEDS if importlib.util.find_spec(package) is None)
