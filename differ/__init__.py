"""Compare two traces: the first step, phase and parameter at which two runs part, and why.

    result = differ.diff("a.h5", "b.h5")

`diff` reads both files, computes one `DiffResult` and leaves the rendering to `differ.reporters`.  This package imports
numpy, h5py and the standard library, never a framework; and nothing at all before it is used, because pytest loads its
plugin at every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from differ.engine import diff
    from differ.options import DiffOptions
    from differ.result import Cause, Counts, DiffResult, Finding, Verdict

__all__ = ["Cause", "Counts", "DiffOptions", "DiffResult", "Finding", "Verdict", "diff"]

_HOME: Final = {"diff": "differ.engine", "DiffOptions": "differ.options"}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "differ.result")), name)
