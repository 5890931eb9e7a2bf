"""Import what a command needs without looking for garbage meanwhile.

Nothing that an import makes is garbage, but it makes so many objects that the collector walks through all of them half a
dozen times, which takes longer than the imports.  Memory stays bounded: only imports are done in here, and a collector that
was on is on again afterwards.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """The collector rests while the block imports."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
