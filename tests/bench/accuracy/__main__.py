"""`python -m tests.bench.accuracy`: record, compare, and write docs/accuracy.md."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from scenarios.models import cache_folder
from tests.bench.accuracy.arms import ROOT
from tests.bench.accuracy.clean import all_clean
from tests.bench.accuracy.faults import all_faults
from tests.bench.accuracy.measure import Bench
from tests.bench.accuracy.report import page, summary


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="Where runs and answers are kept (default: the cache).")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "accuracy.md")
@click.option("--quick", is_flag=True, help="Every tenth pair, on stdout: to try the benchmark itself.")
def main(folder: Path | None, output: Path, quick: bool) -> None:
    """Measure the accuracy of `trace diff` on planted faults and clean pairs."""
    faults, clean = all_faults(), all_clean()
    if quick:
        faults, clean = faults[::10], clean[::10]
    bench = Bench(faults, clean, folder or cache_folder() / "accuracy", lambda text: click.echo(text, err=True))
    bench.record()
    measured = bench.measure()
    if quick:
        click.echo(page(faults, clean, measured))
        sys.exit()
    output.write_text(page(faults, clean, measured), "utf-8")
    for line in summary(faults, clean, measured):
        click.echo(line)
    click.echo(f"Wrote {output}", err=True)


if __name__ == "__main__":
    main()
