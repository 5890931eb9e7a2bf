"""`trace diff A B`: options in, a report on stdout, the verdict as exit code."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from differ.completion import complete_phases
from differ.options import ENGINE_DTYPES, ENGINES, DiffOptions
from differ.publish import Destination, DestinationType, check, publish_github, write_reports
from differ.reporters import FORMATS, draws_series, reporter
from differ.result import DiffResult, Verdict
from differ.terminal import progress, style
from tracer.errors import BadConfig, BadUsage, NoPermission, NotFound, TraceError
from tracer.loading import without_collection


@click.command("diff", short_help="Name the first divergence of two traces, and why.")
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--policy", type=click.Path(path_type=Path), help="TOML file with tolerances over the defaults.")
@click.option(
    "--noise",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="TWIN",
    help="Twin of A or of B (trace record --twin): its distance from it is the noise floor (repeatable).",
)
@click.option(
    "--map", "name_map", type=click.Path(path_type=Path), help="TOML file with [names] rules: regex = replacement."
)
@click.option("--only", multiple=True, metavar="GLOB", help="Compare only records whose name matches (repeatable).")
@click.option("--omit", multiple=True, metavar="GLOB", help="Leave out records whose name matches (repeatable).")
@click.option(
    "--steps", metavar="A:B", help="Compare steps A to B only; `3` is one step, `:5` up to 5. Step 0 is init."
)
@click.option(
    "--phases", metavar="LIST", shell_complete=complete_phases, help="Judge these phases only, separated by commas."
)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True, help="Kind of report.")
@click.option(
    "--report",
    "reports",
    type=DestinationType(),
    multiple=True,
    metavar="KIND=FILE",
    help="Write a report to a file as well: html=out.html, markdown=, junit=, json=, text= (repeatable).",
)
@click.option(
    "--reference",
    type=click.Choice(ENGINES),
    help="Recompute both sides' losses and gradients from their own inputs: says which side is wrong.",
)
@click.option(
    "--reference-dtype", type=click.Choice(ENGINE_DTYPES), default="float32", show_default=True, help="In which dtype."
)
@click.option("--reference-model", metavar="FOLDER|ID", help="Base model of both, where it is not the one they name.")
@click.option(
    "--fail-on", type=click.Choice(["note"]), help="Exit 1 for a systematic note too: one ratio within tolerance."
)
@click.option("--exit-zero", is_flag=True, help="Exit 0 even when the traces diverged.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit code tells.")
@click.pass_context
def diff(
    ctx: click.Context,
    a: Path,
    b: Path,
    policy: Path | None,
    noise: tuple[Path, ...],
    name_map: Path | None,
    only: tuple[str, ...],
    omit: tuple[str, ...],
    steps: str | None,
    phases: str | None,
    form: str,
    reports: tuple[Destination, ...],
    reference: str | None,
    reference_dtype: str,
    reference_model: str | None,
    fail_on: str | None,
    exit_zero: bool,
    quiet: bool,
) -> None:
    """Compare two traces and name the first step, phase and parameter at which they diverge.

    Exit code: 0 the same, 1 diverged, 2 no answer (nothing in common, or a file that cannot be read).

    \b
    Example:
      trace diff pytorch.h5 mlx.h5
      trace diff a.h5 b.h5 --steps 1:5 --phases grad,param --format json
      trace diff a.h5 b.h5 --report html=out.html
      trace diff a.h5 b.h5 --noise a.twin.h5 --noise b.twin.h5
      trace diff a.h5 b.h5 --reference torch
    """
    with without_collection():
        from differ.engine import diff as compare
        from differ.policy import default_policy, load_policy
    gc.freeze()  # what is loaded now stays until the end: the collector need not look at it again

    check(reports, [path for path in (a, b, policy, name_map, *noise) if path is not None])
    options = DiffOptions(
        policy=load_policy(policy) if policy is not None else default_policy(),
        rules=_rules(name_map),
        only=only,
        omit=omit,
        steps=parse_steps(steps),
        phases=_phases(phases),
        noise=noise,
        series=any(draws_series(kind) for kind in (form, *(report.kind for report in reports))),
    )
    if reference is not None:
        from differ.reference import References, recompute

        first, second = recompute([a, b], dtype=reference_dtype, model=reference_model, steps=options.steps)
        options = replace(options, reference=References(first, second))
    with progress("comparing", quiet=quiet) as report:
        result = compare(a, b, replace(options, progress=report))
    _publish(result, form, reports, quiet=quiet)
    if exit_zero and result.verdict is Verdict.DIVERGED:
        ctx.exit(0)
    if fail_on == "note" and result.verdict is Verdict.SAME and result.systematic and not exit_zero:
        ctx.exit(Verdict.DIVERGED.exit_code)
    ctx.exit(result.verdict.exit_code)


def _publish(result: DiffResult, form: str, reports: tuple[Destination, ...], *, quiet: bool) -> None:
    """Files first, so that a closed pipe costs none of them; the answer is printed even if one could not be written."""
    failure: TraceError | None = None
    wrote: list[str] = []
    try:
        wrote.extend(write_reports(result, reports))
    except TraceError as error:
        failure = error
    if form == "github":
        publish_github(result)
    if not quiet:
        look = style()
        if form == "github":
            click.echo(reporter(form)(result, look), nl=False, err=True)
        click.echo(reporter("text" if form == "github" else form)(result, look), nl=False, color=look.colour)
        for line in wrote:
            click.echo(line, err=True)
    if failure is not None:
        raise failure


def _rules(path: Path | None) -> Any:
    from tracer.names import parse_rules

    if path is None:
        return ()
    import tomllib

    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise NoPermission(f"{path} may not be read", "mend its permissions (chmod u+r)") from error
    except OSError as error:
        raise NotFound(f"name map {path} cannot be opened: {error.strerror or error}", "check the name") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"name map {path} is not TOML: {error}") from error
    table = document.get("tool", {}).get("trace", {}).get("names", document.get("names"))
    if not isinstance(table, dict):
        raise BadConfig(f"name map {path} has no table of names", 'write [names] and "regex" = "replacement"')
    try:
        return parse_rules(table)
    except ValueError as error:
        raise BadConfig(f"{path}: {error}") from error


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """A range of steps, both ends included: `1:5`, `3`, `:5`, `2:`; raises BadUsage."""
    if text is None:
        return None
    low, colon, high = text.partition(":")
    try:
        first = int(low) if low else 0
        last = int(high) if high else first if not colon else sys.maxsize
    except ValueError as error:
        raise BadUsage(f"--steps {text} is not a range", "write 1:5, 3, or 2:") from error
    if first < 0 or last < first:
        raise BadUsage(f"--steps {text} is an empty range", "write the smaller number first")
    return first, last


def _phases(text: str | None) -> Any:
    from tracer.schema import Phase

    if text is None:
        return None
    try:
        return frozenset(Phase.parse(word.strip()) for word in text.split(","))
    except KeyError as error:
        known = ", ".join(phase.label for phase in Phase)
        raise BadUsage(f"--phases: there is no phase {error.args[0].lower()}", f"use {known}") from error
