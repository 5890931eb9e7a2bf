"""The catalogue of known divergences: one TOML file an entry, in the folder `entries`, registered by being there.

Reading an entry imports no framework; the programs that some arms run do so when they run.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from scenarios.catalogue.entry import Entry, read_entry
from tracer.errors import BadUsage

FOLDER: Final = Path(__file__).parent / "entries"


def ids(folder: Path = FOLDER) -> tuple[str, ...]:
    """All entries, in the order of their names."""
    return tuple(sorted(file.stem for file in folder.glob("*.toml")))


def load(name: str, folder: Path = FOLDER) -> Entry:
    """An entry by id; raises BadUsage with the nearest ones, or BadConfig for a file that is wrong."""
    known = ids(folder)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3) or [other for other in known if name in other][:3]
        raise BadUsage(
            f"there is no scenario called {name}",
            f"did you mean {', '.join(near)}?" if near else "see `trace scenarios list`",
        )
    return read_entry(folder / f"{name}.toml")


def load_all(names: Sequence[str] = (), folder: Path = FOLDER) -> tuple[Entry, ...]:
    """The entries asked for, each once; without names all of them."""
    return tuple(load(name, folder) for name in (dict.fromkeys(names) or ids(folder)))
