"""A training program without a framework: hands the rows of a synthetic run to the recorder that runs it.

python synthetic.py [FAULT] [--stop-early] [--die] [--noisy]       FAULT is a key of tests.builders.FAULTS
"""

from __future__ import annotations

import sys
from pathlib import Path

# A program is run by its path: the packages are two folders up.
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.driven import drive


def main(arguments: list[str]) -> None:
    print("training")
    if "--die" in arguments:
        sys.exit("out of cheese")
    faults = [argument for argument in arguments if not argument.startswith("-")]
    stop = "the disk is full" if "--stop-early" in arguments else ""
    drive(fault=faults[0] if faults else None, stop=stop, noise=3e-4 if "--noisy" in arguments else 0.0)


if __name__ == "__main__":
    main(sys.argv[1:])
