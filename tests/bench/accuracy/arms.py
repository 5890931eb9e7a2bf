"""Arms by content: what is recorded, under which name it is kept, and recording what is missing.

A trace is kept under a digest of its arm, of the arms it takes adapters and batches from, of the sources that make it and of
the versions of the frameworks, so a second run of the benchmark records nothing and no stale trace is ever compared.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[3]
STEPS: Final = 5
_MADE_BY: Final = ("tracer/**/*.py", "scenarios/**/*.py", "tests/bench/accuracy/program.py")
_PLANTED_BY: Final = ("tests/bench/accuracy/plants*.py",)
_EDITED_BY: Final = ("tests/bench/accuracy/edits.py",)
_PACKAGES: Final = ("torch", "transformers", "peft", "accelerate", "mlx", "mlx-lm", "numpy", "h5py")
_IRRELEVANT: Final = (
    "tracer/cli",
    "scenarios/calibrate",
    "scenarios/catalogue",
    "scenarios/demo",
    "scenarios/selftest",
)


@dataclass(frozen=True)
class Arm:
    """One recorded run.  `source` gives the adapters that it starts from and, with `fed`, its batches.

    `inside`: module outputs, losses of tokens and gradients of micro-batches are recorded too, outputs of
    `modules` (globs; none: the usual kinds).
    """

    path: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    source: Arm | None = None
    fed: bool = True
    threads: int = 1
    twin: int = 0
    edit: Mapping[str, Any] = field(default_factory=dict)
    inside: bool = False
    modules: tuple[str, ...] = ()

    def but(self, settings: Mapping[str, Any] | None = None, **plan: Any) -> Arm:
        """The same run with other settings, or with faults planted."""
        return replace(self, settings={**self.settings, **(settings or {})}, plan={**self.plan, **plan})

    @property
    def key(self) -> str:
        """Digest of everything that makes the trace."""
        source = self.source.key if self.source is not None else ""
        parts = [self.path, self.settings, self.plan, source, self.fed, self.threads, self.twin, self.edit]
        parts += ["inside", *self.modules] if self.inside else []
        parts += [made_by(), *(made_by(g) for g, used in ((_PLANTED_BY, self.plan), (_EDITED_BY, self.edit)) if used)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


@cache
def made_by(globs: tuple[str, ...] = _MADE_BY) -> str:
    """Digest of the sources and packages that make a trace."""
    return digest_of(globs, [f"{name} {_version(name)}" for name in _PACKAGES])


def digest_of(globs: Iterable[str], words: Iterable[str] = ()) -> str:
    """Digest of source files and words."""
    whole = hashlib.sha256("\n".join(words).encode())
    for path in sorted({path for glob in globs for path in ROOT.glob(glob)}):
        relative = path.relative_to(ROOT).as_posix()
        if not relative.startswith(_IRRELEVANT):
            whole.update(relative.encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@dataclass(frozen=True)
class Store:
    """A folder of traces by key."""

    folder: Path

    def trace(self, arm: Arm) -> Path:
        """Where an arm's trace is."""
        return self.folder / f"{arm.key}.h5"

    def record(self, arms: Iterable[Arm]) -> int:
        """Record the arms that are missing, and those that they take something from; how many were recorded."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = {arm.key: arm for wanted in arms for arm in _with_sources(wanted) if not self.trace(arm).exists()}
        count = len(missing)
        while missing:
            ready = [arm for arm in missing.values() if arm.source is None or arm.source.key not in missing]
            for arm in ready:
                del missing[arm.key]
            self._record_wave(ready)
        return count

    def _record_wave(self, arms: Iterable[Arm]) -> None:
        groups: dict[tuple[str, int], list[Arm]] = defaultdict(list)
        for arm in arms:
            groups["edit" if arm.edit else arm.path, arm.threads].append(arm)
        for key in [key for key in groups if key[0] == "edit"]:
            from tests.bench.accuracy.edits import edit_file

            for arm in groups.pop(key):
                assert arm.source is not None
                edit_file(self.trace(arm.source), self.trace(arm), arm.edit)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda item: self._run(*item[0], item[1]), sorted(groups.items(), key=lambda item: item[0])))

    def _run(self, path: str, threads: int, arms: list[Arm]) -> None:
        given = self.folder / f"{path}-{threads}-{os.getpid()}.json"
        given.write_text(json.dumps([self._given(arm) for arm in arms]), "utf-8")
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        command = [sys.executable, "-W", "ignore", "-m", "tests.bench.accuracy.program", path, str(given)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | counts)
        given.unlink()
        if done.returncode:
            raise RuntimeError(f"recording on path {path} failed:\n{done.stderr[-4000:]}")

    def _given(self, arm: Arm) -> dict[str, Any]:
        source = str(self.trace(arm.source)) if arm.source is not None else None
        return {
            "settings": arm.settings,
            "plan": arm.plan,
            "twin": arm.twin,
            "inside": arm.inside,
            "modules": arm.modules,
            "init_from": source,
            "batches_from": source if arm.fed else None,
            "trace": str(self.trace(arm)),
        }


def _with_sources(arm: Arm) -> Iterator[Arm]:
    if arm.source is not None:
        yield from _with_sources(arm.source)
    yield arm
