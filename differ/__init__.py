"""Compare two traces: the first step, phase and parameter at which two runs part, and why.

    result = differ.diff("a.h5", "b.h5")

`diff` reads both files, computes one `DiffResult` and leaves the rendering to `differ.reporters`.  This package imports
numpy, h5py and the standard library, never a framework.
"""

from __future__ import annotations

from differ.engine import diff
from differ.options import DiffOptions
from differ.result import Cause, Counts, DiffResult, Finding, Verdict

__all__ = ["Cause", "Counts", "DiffOptions", "DiffResult", "Finding", "Verdict", "diff"]
