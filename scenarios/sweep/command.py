"""`trace sweep`: settings times seeds on one or two paths, on local processes or on a Dask cluster."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

import click

DEFAULT_CACHE: Final = Path(".trace-sweep")


@click.command()
@click.argument("plan", required=False, type=click.Path(path_type=Path), metavar="[PLAN.toml]")
@click.option("--path", "paths", multiple=True, metavar="NAME", help="Training path; two are compared (repeatable).")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings of every run, as TOML.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a setting of every run.")
@click.option("--grid", multiple=True, metavar="KEY=[V, …]", help="Values of a setting; all combinations are cells.")
@click.option(
    "--baseline", multiple=True, metavar="KEY=VALUE", help="One path: a setting of what cells are compared with."
)
@click.option("--seeds", default="", metavar="N|[S, …]", help="Number of seeds, or their list.  [default: 5]")
@click.option("--pass", "rule", default="", metavar="RULE", help="same (default), loss<=2.5, eval:NAME>=0.9")
@click.option("--share", is_flag=True, help="Two paths: b starts from a's adapters and trains on its batches.")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="Local worker processes.")
@click.option(
    "--cluster", default="", metavar="ADDRESS", help="Dask scheduler, tcp://host:8786, instead of local ones."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each run.")
@click.option("--policy", type=click.Path(path_type=Path), help="TOML file with tolerances over the defaults.")
@click.option("--cache", type=click.Path(path_type=Path), default=DEFAULT_CACHE, show_default=True, help="Results.")
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No plan and no progress.")
@click.pass_context
def sweep(ctx: click.Context, /, plan: Path | None, **options: Any) -> None:
    """Run every cell of a grid with several seeds, and say how often each passes and where it diverges first.

    \b
    trace sweep plan.toml
    trace sweep --path mlx --set train.steps=2 --grid 'clip.value=[0.01, 0.1]' --set clip.mode=value \\
                --baseline clip.mode=none --seeds 15
    trace sweep plan.toml --cluster tcp://scheduler:8786

    Results are kept in the cache folder: after Ctrl-C the same command goes on where it was.

    Exit codes: 0 every run passed, 1 some did not, 2 some gave no answer, 130 Ctrl-C.
    """
    from differ.policy import default_policy, load_policy
    from scenarios.bisect.store import Store
    from scenarios.status import clock, status
    from scenarios.sweep.plan import Asked, make_plan
    from scenarios.sweep.run import Sweep
    from scenarios.sweep.spread import Spread
    from scenarios.sweep.table import render

    names = ("paths", "config", "settings", "grid", "baseline", "seeds", "rule", "share")
    made = make_plan(plan, Asked(**{name: options[name] for name in names}))
    policy = load_policy(options["policy"]) if options["policy"] is not None else default_policy()
    spread = Spread(options["processes"], options["cluster"], options["threads"], policy)
    began, quiet = time.monotonic(), options["quiet"]
    with status(quiet=quiet) as show:
        running = Sweep(made, spread, Store(options["cache"]))
        running.told = lambda done, total: show(f"{done} of {total}")
        pending = running.pending()
        if not quiet:
            click.echo(f"trace: {_plan(made, running, len(pending))}", err=True)
        try:
            table = running.run(pending)
        except KeyboardInterrupt:
            kept = len(running.results)
            click.echo(f"trace: {kept} results are kept in {options['cache']}; the same command goes on", err=True)
            raise
    click.echo(render(table, options["form"]), nl=False)
    if not quiet:
        lost = f"; what gave no answer ({table.unanswered}) is tried again the next time" if table.unanswered else ""
        click.echo(f"trace: {running.runs} runs in {clock(time.monotonic() - began)}{lost}", err=True)
    ctx.exit(table.exit_code)


def _plan(plan: Any, running: Any, pending: int) -> str:
    where = f"on {running.spread.cluster}" if running.spread.cluster else f"on {running.spread.processes} processes"
    known = f", {running.known} known from the cache" if running.known else ""
    cells, seeds = len(plan.cells), len(plan.seeds)
    return f"{cells} cell{'s' * (cells != 1)} × {seeds} seed{'s' * (seeds != 1)}, {pending} to run {where}{known}"
