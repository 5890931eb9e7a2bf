"""How long a `trace diff` of two small traces takes, beside what it cannot do without: `python -m tests.bench.startup A B [C …]`.

    bar    `python -c "import numpy, h5py"` in the same call of hyperfine, started and ended without a shell
    ratio  of the medians; at most 2.5 is the aim

B, C … are each compared with A.  Other work on the machine moves the times by more than the ratio: `--instructions` counts
instructions instead (valgrind), which do not change with the load.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

BAR = [sys.executable, "-c", "import numpy, h5py"]
LIMIT = 2.5


def commands(a: Path, others: Sequence[Path]) -> dict[str, list[str]]:
    """What is timed, by the words for it."""
    return {
        "import numpy, h5py": BAR,
        **{f"diff {a.name} {b.name}": [sys.executable, "-m", "tracer", "diff", str(a), str(b)] for b in others},
    }


def seconds(asked: Sequence[Sequence[str]], runs: int) -> list[float]:
    """Median time of each command from start to end, one hyperfine for all."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "times.json"
        command = ["hyperfine", "-N", "-i", "--warmup", "2", "--runs", str(runs), "--export-json", str(answer)]
        subprocess.run([*command, *map(shlex.join, asked)], check=True, stdout=subprocess.DEVNULL)
        return [float(result["median"]) for result in json.loads(answer.read_text("utf-8"))["results"]]


def instructions(asked: Sequence[Sequence[str]]) -> list[float]:
    """How many million instructions each command takes."""
    count = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    found = []
    for command in asked:
        done = subprocess.run([*count, *command], capture_output=True, text=True)
        refs = re.search(r"I +refs: +([\d,]+)", done.stderr)
        if refs is None:
            raise RuntimeError(done.stderr[-500:])
        found.append(int(refs[1].replace(",", "")) / 1e6)
    return found


def main() -> None:
    """Print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path)
    parser.add_argument("others", type=Path, nargs="+")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--instructions", action="store_true")
    given = parser.parse_args()
    asked = commands(given.a, given.others)
    found = instructions([*asked.values()]) if given.instructions else seconds([*asked.values()], given.runs)
    for name, value in zip(asked, found, strict=True):
        shown = f"{value:,.0f} M" if given.instructions else f"{1e3 * value:.0f} ms"
        beyond = "" if given.instructions or value <= LIMIT * found[0] else f"  above {LIMIT}"
        print(f"{shown:>9}  {value / found[0]:5.2f}  {name}{beyond}")


if __name__ == "__main__":
    main()
