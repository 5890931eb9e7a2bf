"""`make_environment.py PINS VENV`: a virtual environment with packages from a folder of sources, and with what runs this.

The folder (`STORE`) holds NAME-VERSION/NAME.py.  Nothing is downloaded: the packages are copied, the rest is reached through a
.pth file.  As real packages do, one may need a version of another (`needs` in its folder), or there is no environment.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import venv
from pathlib import Path


def make(pins: dict[str, str], folder: Path, store: Path) -> None:
    """Make the environment, or end with a line that says why not."""
    for name, version in pins.items():
        needs = store / f"{name}-{version}" / "needs"
        if needs.exists():
            other, wanted = needs.read_text().strip().split("==")
            if pins.get(other) != wanted:
                sys.exit(f"{name} {version} needs {other} {wanted}, not {pins.get(other)}")
    venv.create(folder, symlinks=True, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "outside.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{Path(__file__).parents[3]}\n")
    for name, version in pins.items():
        shutil.copy(store / f"{name}-{version}" / f"{name}.py", site)


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text().split()
    make(dict(line.split("==") for line in lines), Path(sys.argv[2]), Path(os.environ["STORE"]))
