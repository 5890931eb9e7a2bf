"""`trace scenarios`: list the catalogue of known divergences, show one, run them.

Exit code of `run`: 0 all as expected, 1 some not, 2 a run failed or nothing could be run.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click
from click.shell_completion import CompletionItem

from scenarios import catalogue
from scenarios.catalogue.entry import Entry
from tracer.errors import BadUsage, NoPermission

FORMATS: Final = ("text", "json", "markdown", "junit")


class _Id(click.ParamType[str]):
    """An entry's id; its own error says which are near."""

    name = "id"

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - the signature is click's
        param: click.Parameter,  # noqa: ARG002
        incomplete: str,
    ) -> list[CompletionItem]:
        """Ids that begin so."""
        return [CompletionItem(name) for name in catalogue.ids() if name.startswith(incomplete)]


@click.group()
def scenarios() -> None:
    """Known divergences, each as a pair of runs and what `trace diff` must say of it.

    \b
    trace scenarios list
    trace scenarios show bug-05-no-bias-correction
    trace scenarios run --all
    trace scenarios run story-04-value-clip --keep out
    """


@scenarios.command("list")
def list_entries() -> None:
    """All entries: id, title."""
    entries = catalogue.load_all()
    width = max(len(entry.id) for entry in entries)
    for entry in entries:
        click.echo(f"{entry.id:<{width}}  {entry.title}{' (emulated)' if entry.emulated else ''}")


@scenarios.command()
@click.argument("name", metavar="ID", type=_Id())
def show(name: str) -> None:
    """One entry: the finding, its source, the arms, what is expected.

    \b
    trace scenarios show story-01-last-16-layers
    """
    click.echo("\n".join(_described(catalogue.load(name))))


def _described(entry: Entry) -> Iterator[str]:
    yield f"{entry.id}: {entry.title}"
    yield ""
    yield from click.wrap_text(entry.finding, 100).splitlines()
    yield from (f"source    {link}" for link in entry.source)
    if entry.emulated:
        yield f"emulated  {entry.emulated}"
    for arm in entry.arms.values():
        what = f"{'program' if arm.program else 'path'} {arm.runner}{f' on {arm.ranks} ranks' if arm.ranks > 1 else ''}"
        settings = ", ".join(f"{key} = {value}" for key, value in {**arm.settings, **arm.options}.items())
        taken = [f"{word} of {name}" for word, name in (("adapters", arm.init), ("batches", arm.batches)) if name]
        yield f"{f'arm {arm.name} ':<10}{'; '.join(filter(None, [what, settings, ', '.join(taken)]))}"
    for check in entry.checks:
        yield f"expected  {' and '.join(check.arms)}: {check.line()}"


@scenarios.command()
@click.argument("names", metavar="[ID]...", nargs=-1, type=_Id())
@click.option("--all", "everything", is_flag=True, help="All entries.")
@click.option("-j", "--jobs", type=click.IntRange(1), help="Processes at a time (default: one for each core).")
@click.option(
    "--seeds", type=click.IntRange(1), metavar="N", help="Each N times, with other seeds; how many are right."
)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True, help="Of the results.")
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Leave traces and HTML reports."
)
def run(
    names: tuple[str, ...], everything: bool, jobs: int | None, seeds: int | None, form: str, keep: Path | None
) -> int:
    """Record both arms of each entry and the clean one, compare them, and hold that against what is expected.

    \b
    trace scenarios run --all
    trace scenarios run bug-05-no-bias-correction --keep out
    trace scenarios run --all --format junit > scenarios.xml
    trace scenarios run bug-05-no-bias-correction --seeds 15

    Exit codes: 0 all as expected, 1 some not, 2 a run failed or nothing could be run.
    """
    if everything == bool(names):
        raise BadUsage("give ids or --all", "see `trace scenarios list`")
    from differ.terminal import progress
    from scenarios.catalogue.reports import FORMATS as RENDER
    from scenarios.catalogue.running import run_all
    from scenarios.catalogue.seeds import table, with_seeds

    entries = catalogue.load_all(names)
    if seeds is not None:
        entries = with_seeds(entries, seeds)
    with _folder(keep) as folder, progress("scenarios", unit="task") as told:
        report = run_all(
            entries,
            folder,
            workers=jobs or os.cpu_count() or 1,
            html=keep is not None,
            progress=told or _silent,
        )
    click.echo(table(report) if seeds is not None and form == "text" else RENDER[form](report), nl=False)
    if keep is not None:
        click.echo(f"wrote {keep}", err=True)
    return report.exit_code


def _silent(_done: int, _total: int) -> None:
    """Progress where nobody would see it."""


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder of the run: the one to keep, else one that is removed at the end."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="scenarios-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NoPermission(f"{keep} cannot be made: {error.strerror or error}", "choose another folder") from error
    yield keep
