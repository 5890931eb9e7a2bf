"""`python -m tests.bench.accuracy`: record, compare, and write docs/accuracy.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import click

from scenarios.models import cache_folder
from tests.bench.accuracy.arms import ROOT
from tests.bench.accuracy.clean import Clean, all_clean
from tests.bench.accuracy.fault import Fault
from tests.bench.accuracy.faults import all_faults
from tests.bench.accuracy.measure import Bench
from tests.bench.accuracy.report import page, summary

Pair = TypeVar("Pair", Fault, Clean)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where runs and answers are kept (default: the cache).")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "accuracy.md")
@click.option("--quick", is_flag=True, help="Every tenth pair, on stdout: to try the benchmark itself.")
@click.option(
    "--only", multiple=True, metavar="GLOB", help="Pairs whose name begins so, on stdout; several may be given."
)
def main(folder: Path | None, output: Path, quick: bool, only: tuple[str, ...]) -> None:
    """Measure the accuracy of `trace diff` on planted faults and clean pairs."""
    faults, clean = all_faults(), all_clean()
    if quick:
        faults, clean = faults[::10], clean[::10]
    if only:
        faults, clean = _fitting(faults, only), _fitting(clean, only)
    if not faults and not clean:
        raise click.UsageError(f"no pair is called {' or '.join(only)}")
    bench = Bench(faults, clean, folder or cache_folder() / "accuracy", lambda text: click.echo(text, err=True))
    bench.record()
    measured = bench.measure()
    if quick or only:
        click.echo(page(faults, clean, measured))
        sys.exit()
    output.write_text(page(faults, clean, measured), "utf-8")
    for line in summary(faults, clean, measured):
        click.echo(line)
    click.echo(f"Wrote {output}", err=True)


def _fitting(pairs: Sequence[Pair], globs: tuple[str, ...]) -> list[Pair]:
    """Pairs whose name begins with one of the globs."""
    return [pair for pair in pairs if any(fnmatchcase(pair.id, f"{glob}*") for glob in globs)]


if __name__ == "__main__":
    main()
