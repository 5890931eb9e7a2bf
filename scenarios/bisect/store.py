"""The cache folder of a bisection: what was recorded and compared, by content.

    runs/KEY.json     how a run ended: its digest, seconds, or the error, after which it is tried again the next time
    runs/KEY.h5       its trace, as long as it may still be compared with
    diffs/KEY.json    verdict, first finding and causes of two runs
    envs/KEY/         an environment, and KEY.json beside it once it is whole or could not be made, which is tried again too

A file appears whole or not at all (written beside and renamed), so that a bisection may be killed at any moment and goes on
where it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracer.errors import NoPermission, TraceError


class UnusableCache(TraceError):
    """A cache folder that cannot be written."""

    slug = "unusable-cache"


@dataclass(frozen=True, slots=True)
class Store:
    """A cache folder; made when the first thing is written."""

    folder: Path

    def trace(self, key: str) -> Path:
        """Where the trace of a run is, or will be."""
        return self.folder / "runs" / f"{key}.h5"

    def environment(self, key: str) -> Path:
        """Where an environment is, or will be."""
        return self.folder.resolve() / "envs" / key

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """What was written under a key, None if nothing or something unreadable."""
        try:
            value = json.loads(self._file(kind, key).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Write under a key; raises UnusableCache or NoPermission."""
        file = self._file(kind, key)
        beside = file.with_name(f"{file.name}.{os.getpid()}")
        self.prepare(kind)
        try:
            beside.write_text(json.dumps(value, sort_keys=True, indent=1) + "\n", "utf-8")
            beside.replace(file)
        except OSError as error:
            raise UnusableCache(f"{file} cannot be written: {error}", "give another folder with --cache") from error

    def prepare(self, kind: str) -> None:
        """Make the folder of a kind."""
        try:
            (self.folder / kind).mkdir(parents=True, exist_ok=True)
        except PermissionError as error:
            raise NoPermission(f"{self.folder} may not be written", "give another folder with --cache") from error
        except OSError as error:
            raise UnusableCache(f"{self.folder} cannot be made: {error}", "give another folder with --cache") from error

    def drop_trace(self, key: str) -> None:
        """Forget the trace of a run; what it said stays."""
        self.trace(key).unlink(missing_ok=True)

    def drop_environment(self, key: str) -> None:
        """Remove an environment that was not finished."""
        shutil.rmtree(self.environment(key), ignore_errors=True)

    def _file(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.json"
