"""The distribution's name and version, in a module that imports nothing."""

from typing import Final

DISTRIBUTION: Final = "steptrace"
VERSION: Final = "0.1.0"
