"""`trace gate`: run the gates of pyproject.toml, one after the other, and say which of them diverged.

Reports on stdout, talk on stderr.  A gate that gives no answer does not stop the others.  Exit code: 2 if any gave no
answer, else 1 if any diverged (or its baseline was rewritten), else 0.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import click

from differ import baseline as baselines
from differ.gate import Gate, find_project, load_gates, record
from differ.options import DiffOptions
from differ.publish import publish_github
from differ.reporters import FORMATS, draws_series, reporter
from differ.result import DiffResult, Verdict
from differ.terminal import Report, progress, style
from tracer.errors import BadUsage, TraceError

NO_ANSWER: Final = 2
# A document of these kinds holds one comparison.
_SINGLE: Final = ("json", "junit")
# In the order in which GitHub is told: what is told last stays as the step's output.
_SEVERITY: Final = (Verdict.SAME, Verdict.INCOMPARABLE, Verdict.DIVERGED)


@dataclass(frozen=True, slots=True)
class Shown:
    """How results are shown and kept."""

    form: str
    artifacts: Path | None

    @property
    def series(self) -> bool:
        """Whether a report draws curves."""
        return self.artifacts is not None or draws_series(self.form)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one gate: its exit code, and the comparison if there was one."""

    code: int
    result: DiffResult | None = None


@click.command("gate")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option(
    "--update", is_flag=True, help="Rewrite baselines that changed, show what changed, and exit 1: review them."
)
@click.option("--list", "only_list", is_flag=True, help="Only list the gates and their baselines.")
@click.option(
    "--project", type=click.Path(path_type=Path), metavar="FILE", help="The pyproject.toml (default: the nearest)."
)
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True, help="Kind of report.")
@click.option(
    "--artifacts",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep the trace, the log and all reports of a gate that fails.",
)
@click.pass_context
def gate(
    ctx: click.Context,
    names: tuple[str, ...],
    update: bool,
    only_list: bool,
    project: Path | None,
    form: str,
    artifacts: Path | None,
) -> None:
    """Run the gates of [tool.trace.gate.*] in pyproject.toml and compare each with its baseline.

    Exit code: 0 all the same, 1 one diverged (or was rewritten by --update), 2 one gave no answer.

    \b
    Example:
      trace gate
      trace gate lora --artifacts out
      trace gate --update lora
    """
    path = project if project is not None else find_project(Path.cwd())
    gates = load_gates(path)
    unknown = [name for name in names if name not in gates]
    if unknown:
        raise BadUsage(f"there is no gate {unknown[0]} in {path}", f"gates are {', '.join(gates)}")
    chosen = [gates[name] for name in dict.fromkeys(names)] or list(gates.values())
    if only_list:
        for one in chosen:
            state = "" if one.baseline.is_file() else "  (no baseline)"
            click.echo(f"{one.name}  {_short(one.baseline)}  {' '.join(one.program)}{state}")
        ctx.exit(0)
    if form in _SINGLE and len(chosen) > 1:
        raise BadUsage(
            f"--format {form} holds one comparison, and there are {len(chosen)} gates", "name one, or use --artifacts"
        )
    shown = Shown(form, artifacts)
    outcomes = []
    for number, one in enumerate(chosen, 1):
        place = f" ({number} of {len(chosen)})" if len(chosen) > 1 else ""
        outcomes.append(_run(one, shown, place, update=update))
    _tell_github(form, outcomes)
    for stray in baselines.unused([file for one in gates.values() for file in (one.baseline, *one.noise)]):
        _say(f"unused baseline: {_short(stray)} is beside the others, and no gate names it")
    ctx.exit(_summary(chosen, outcomes))


def _run(one: Gate, shown: Shown, place: str, *, update: bool) -> Outcome:
    """Record one gate, compare it, report.  An error is told and counts as no answer.  `place`: which of them it is."""
    with tempfile.TemporaryDirectory(prefix="trace-gate-") as folder:
        trace, log = Path(folder, "run.h5"), Path(folder, "run.log")
        try:
            if not update:
                one.require_baseline()
            _say(f"gate {one.name}{place}: recording {' '.join(one.program).removeprefix('-- ')}")
            record(one, trace, log)
            return _update(one, trace, shown) if update else _compare(one, trace, shown)
        except TraceError as error:
            _say(error.line())
            if shown.artifacts is not None and log.exists():
                _keep_log(log, shown.artifacts, one.name)
            return Outcome(NO_ANSWER)


def _compare(one: Gate, trace: Path, shown: Shown) -> Outcome:
    with progress(f"comparing gate {one.name}") as report:
        result = baselines.compare(one.baseline, trace, _options(one, shown, report))
    if result.verdict is not Verdict.SAME and shown.artifacts is not None:
        for line in baselines.keep(result, trace, shown.artifacts, one.name):
            _say(line)
        _keep_log(trace.with_name("run.log"), shown.artifacts, one.name)
    _report(one, result, shown)
    return Outcome(result.verdict.exit_code, result)


def _update(one: Gate, trace: Path, shown: Shown) -> Outcome:
    with progress(f"comparing gate {one.name}") as report:
        options = _options(one, shown, report)
        updated = baselines.update(one.baseline, trace, options, fingerprint=one.fingerprint)
    if not updated.why:
        _say(f"gate {one.name}: nothing changed, {_short(one.baseline)} stays as it is")
        return Outcome(0, updated.result)
    if updated.result is not None:
        _report(one, updated.result, shown)
    size = max(1, round(one.baseline.stat().st_size / 1000))
    _say(f"gate {one.name}: wrote {_short(one.baseline)} ({size:,} kB) because {updated.why}; review and commit it")
    return Outcome(Verdict.DIVERGED.exit_code, updated.result)


def _options(one: Gate, shown: Shown, report: Report | None) -> DiffOptions:
    return replace(one.options(series=shown.series), progress=report)


def _report(one: Gate, result: DiffResult, shown: Shown) -> None:
    look = style()
    if shown.form == "github":
        click.echo(reporter("github")(result, look), nl=False, err=True)
    form = "text" if shown.form == "github" else shown.form
    click.echo(reporter(form)(result, look), nl=False, color=look.colour)
    if form == "text":
        click.echo(f"  gate     {one.name}: a is the baseline {_short(one.baseline)}, b is this run")


def _tell_github(form: str, outcomes: Sequence[Outcome]) -> None:
    results = [outcome.result for outcome in outcomes if outcome.result is not None]
    if form == "github":
        for result in sorted(results, key=lambda result: _SEVERITY.index(result.verdict)):
            publish_github(result)


def _summary(chosen: Sequence[Gate], outcomes: Sequence[Outcome]) -> int:
    """Say what came of all gates, if there are several; the exit code."""
    codes = [outcome.code for outcome in outcomes]
    if len(chosen) > 1:
        words = {0: "same", 1: "changed", NO_ANSWER: "without an answer"}
        counts = ", ".join(f"{codes.count(code)} {word}" for code, word in words.items() if code in codes)
        _say(f"{len(chosen)} gates: {counts}")
    return NO_ANSWER if NO_ANSWER in codes else max(codes)


def _keep_log(log: Path, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log, folder / f"{baselines.safe_name(name)}.log")


def _short(path: Path) -> str:
    """A path as seen from here, if it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _say(line: str) -> None:
    click.echo(f"trace: {line}", err=True)
