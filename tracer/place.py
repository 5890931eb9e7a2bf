"""Which process of a run this is: its rank and how many there are, as its launcher says in the environment.

Read from torchrun (also accelerate, deepspeed), mlx.launch and MPI; nothing is asked of a framework.  Standard library only:
it is read when an interpreter starts.  A process without a rank, or alone in its world, has no place and writes its trace
under the name that it was given; the others write `run.rank0.h5`, `run.rank1.h5` …
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# (rank, world size) under each launcher: torchrun and what is built on it, MPI's.
VARIABLES: Final = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MLX_RANK", "MLX_WORLD_SIZE"),
)
# What `accelerate launch` sets in the one process that it starts, which has no rank.
ALONE: Final = "ACCELERATE_MIXED_PRECISION"
# Files in which mlx.launch lists the processes, one entry each.
MLX_LISTS: Final = ("MLX_HOSTFILE", "MLX_IBV_DEVICES", "MLX_JACCL_DEVICES")
# How many times torchrun has started this rank anew after a failure.
RESTARTS: Final = "TORCHELASTIC_RESTART_COUNT"
RANK_FILE: Final = re.compile(r"(?P<stem>.+)\.rank(?P<rank>\d+)(?P<suffix>\.[^.]+)?")


@dataclass(frozen=True, slots=True)
class Place:
    """One process of several: `rank` from 0, of `world_size`.  `restart`: which attempt of it, from 0."""

    rank: int
    world_size: int
    restart: int = 0

    def file(self, path: str | os.PathLike[str]) -> Path:
        """The trace of this rank where the run's was to be `path`: `run.rank1.h5`."""
        whole = Path(path)
        again = f".restart{self.restart}" if self.restart else ""
        return whole.with_name(f"{whole.stem}{again}.rank{self.rank}{whole.suffix}")


# Set in a process that `trace record` reached through its launcher: the same for all of one run.
_launch = ""


def set_launch(name: str) -> None:
    """Name the launch that this process belongs to."""
    global _launch
    _launch = name


def launch() -> str:
    """Name of the launch that this process belongs to; empty if it recorded itself."""
    return _launch


def place(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process's place among several; None if it is alone, or nobody says."""
    found = os.environ if environment is None else environment
    for rank_name, size_name in VARIABLES:
        rank = _number(found.get(rank_name))
        if rank is None:
            continue
        size = _number(found.get(size_name))
        if size is None and rank_name == "MLX_RANK":
            size = _listed(found)
        if size is not None and (size > 1 or _launch) and rank < size:
            return Place(rank, size, _number(found.get(RESTARTS)) or 0)
    return Place(0, 1) if _launch and ALONE in found else None


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _listed(environment: Mapping[str, str]) -> int | None:
    """How many processes mlx.launch has listed."""
    for name in MLX_LISTS:
        try:
            listed = json.loads(Path(environment[name]).read_text())
        except (KeyError, OSError, ValueError):
            continue
        if isinstance(listed, list):
            return len(listed)
    return None


def split_rank(path: Path) -> tuple[Path, int] | None:
    """The run's name and the rank of a rank's file (`run.h5`, 1); None for any other name."""
    match = RANK_FILE.fullmatch(path.name)
    if match is None:
        return None
    return path.with_name(match["stem"] + (match["suffix"] or "")), int(match["rank"])


def ranks_in(folder: Path) -> dict[Path, dict[int, Path]]:
    """The files of ranks in a folder: run's name -> rank -> file.  A folder that may not be listed holds none for us."""
    runs: dict[Path, dict[int, Path]] = {}
    try:
        files = sorted(folder.iterdir())
    except OSError:
        return {}
    for file in files:
        if (found := split_rank(file)) is not None and os.path.isfile(file):
            runs.setdefault(found[0], {})[found[1]] = file
    return {run: dict(sorted(by_rank.items())) for run, by_rank in sorted(runs.items())}


def rank_files(path: Path) -> dict[int, Path]:
    """The files of the ranks of the run `path`, by rank, as far as they are there."""
    return ranks_in(path.parent).get(path, {})


def restarted(path: Path) -> list[Path]:
    """Files of ranks of the run `path` that torchrun has started anew after a failure: `run.restart1.rank0.h5`."""
    name = re.compile(rf"{re.escape(path.stem)}\.restart\d+{re.escape(path.suffix)}")
    return [file for run, files in ranks_in(path.parent).items() if name.fullmatch(run.name) for file in files.values()]
