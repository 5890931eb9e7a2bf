"""`trace bisect`: which settings, components or package pins make b diverge from a."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any, Final

import click

from tracer.errors import BadUsage, NotFound

DEFAULT_CACHE: Final = Path(".trace-bisect")
PROGRAM: Final = "scenarios.bisect.program"


class WithProgram(click.Command):
    """A command whose words after `--` are a program, which click would mix with its own arguments."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the program aside."""
        if "--" in args:
            ctx.meta[PROGRAM] = tuple(args[args.index("--") + 1 :])
            args = args[: args.index("--")]
        return super().parse_args(ctx, args)


@click.command(cls=WithProgram)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="[A.toml [B.toml]] [-- PROGRAM …]")
@click.option("--path", "path_name", metavar="NAME", help="Training path of a, and of b without --across.")
@click.option("--across", metavar="NAME", help="Training path of b: components are moved between the two paths.")
@click.option("--python", default="", metavar="PYTHON", help="Run both under the interpreter of another environment.")
@click.option("--set-a", multiple=True, metavar="KEY=VALUE", help="Change a setting of a (repeatable).")
@click.option("--set-b", multiple=True, metavar="KEY=VALUE", help="Change a setting of b (repeatable).")
@click.option("--pins", nargs=2, type=click.Path(path_type=Path), metavar="A.txt B.txt", help="Two lists of packages.")
@click.option("--make", metavar="COMMAND", help="Makes an environment: 'make-env.sh {pins} {venv}'.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True, help="Steps of a run, to begin with.")
@click.option("--max-steps", type=click.IntRange(1), help="Doubled up to this while b is the same as a.  [default: 8]")
@click.option("--max-runs", type=click.IntRange(1), help="Stop after recording so many runs.")
@click.option("--max-time", type=click.FloatRange(0, min_open=True), metavar="MINUTES", help="Start no run after this.")
@click.option("--what", default="", metavar="LIST", help="Phases to record, with commas (default: all but forward).")
@click.option("--policy", type=click.Path(path_type=Path), help="TOML file with tolerances over the defaults.")
@click.option("--warm", is_flag=True, help="Record in processes that stay: faster, and less like a run of its own.")
@click.option("--no-repeat", is_flag=True, help="Do not run a twice to see that it is reproducible.")
@click.option("--cache", type=click.Path(path_type=Path), default=DEFAULT_CACHE, show_default=True, help="Results.")
@click.option("--keep", is_flag=True, help="Keep the traces of all runs in the cache.")
@click.option("--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
@click.option("-q", "--quiet", is_flag=True, help="No plan and no progress.")
@click.pass_context
def bisect(ctx: click.Context, /, files: tuple[Path, ...], **options: Any) -> None:
    """Find the smallest set of settings of B that makes A diverge, with the first address and cause of each.

    \b
    trace bisect a.toml b.toml --path mlx-lm
    trace bisect a.toml --path mlx-lm --across unsloth-mlx
    trace bisect a.toml --path mlx-lm --set-b clip.mode=value
    trace bisect --pins good.txt bad.txt --make 'make-env.sh {pins} {venv}' -- train.py

    Results are kept in the cache folder: after Ctrl-C, or with more budget, the same command goes on where it was.

    Exit codes: 0 b is the same as a, 1 it diverged and what makes it is named, 2 no answer or not finished, 130 Ctrl-C.
    """
    from contextlib import ExitStack

    from differ.policy import default_policy, load_policy
    from scenarios.bisect.engine import Bisection
    from scenarios.bisect.report import render
    from scenarios.bisect.runs import Runs
    from scenarios.bisect.store import Store
    from scenarios.hosts import Hosts
    from scenarios.status import clock, status

    space = _space(files, ctx.meta.get(PROGRAM, ()), options)
    steps, quiet = options["steps"], options["quiet"]
    limit = options["max_time"]
    with ExitStack() as stack:
        show = stack.enter_context(status(quiet=quiet))
        runs = Runs(
            Store(options["cache"]),
            max_runs=options["max_runs"],
            max_seconds=limit * 60 if limit else None,
            policy=load_policy(options["policy"]) if options["policy"] is not None else default_policy(),
            hosts=stack.enter_context(Hosts()) if options["warm"] else None,
            keep=options["keep"],
        )
        expected = expected_runs(len(space.items()), repeat=not options["no_repeat"])
        runs.telling = lambda about: show(f"run {runs.counts.recorded + 1} of about {expected}: {about}")

        def planned(seconds: float) -> None:
            if seconds and not quiet:
                click.echo(f"trace: one run takes {seconds:.1f} s, about {clock(seconds * expected)} in all", err=True)

        if not quiet:
            click.echo(f"trace: {_plan(space, steps, expected, options)}", err=True)
        ceiling = options["max_steps"] or max(8, steps)
        bisection = Bisection(space, runs, steps, max(steps, ceiling), not options["no_repeat"], planned)
        try:
            report = bisection.run()
        except KeyboardInterrupt:
            click.echo(
                f"trace: {runs.counts.recorded} runs are kept in {options['cache']}; the same command goes on", err=True
            )
            raise
    click.echo(render(report, options["form"]), nl=False)
    ctx.exit(report.exit_code)


def expected_runs(items: int, *, repeat: bool, causes: int = 3) -> int:
    """Estimate of the runs of a bisection with three causes: two (three) for a and b, 2 log₂ n for each cause."""
    return 2 + repeat + causes * 2 * math.ceil(math.log2(items)) if items > 1 else 2 + repeat


def _plan(space: Any, steps: int, expected: int, options: dict[str, Any]) -> str:
    items = space.items()
    kinds = {kind: sum(item.kind == kind for item in items) for kind in ("setting", "component", "pin")}
    counted = ", ".join(f"{number} {kind}{'s' * (number != 1)}" for kind, number in kinds.items() if number)
    budget = [f"at most {options['max_runs']} runs"] if options["max_runs"] else []
    budget += [f"at most {options['max_time']:g} min"] if options["max_time"] else []
    return (
        f"a and b differ in {counted or 'nothing'}; about {expected} runs of {steps} step{'s' * (steps != 1)} "
        f"if three of them matter{''.join(f', {part}' for part in budget)}; the first one is timed"
    )


def _space(configs: tuple[Path, ...], program: tuple[str, ...], options: dict[str, Any]) -> Any:
    from scenarios.bisect.environments import split_command
    from scenarios.bisect.space import Side, Space

    pins = options["pins"]
    if options["python"] and (pins or program):
        raise BadUsage("--python is for --path", "environments of pins have their own interpreter")
    if bool(pins) != bool(options["make"]):
        raise BadUsage("--pins and --make belong together", "--pins a.txt b.txt --make 'make-env.sh {pins} {venv}'")
    lists = [_pins(file) for file in pins] if pins else [None, None]
    if pins:
        split_command(options["make"])
    if program:
        if not pins:
            raise BadUsage("a program has no settings that could be changed", "give --pins and --make, or --path")
        if configs or options["path_name"] or options["across"] or options["set_a"] or options["set_b"]:
            raise BadUsage("a program reads its own settings", "leave out configurations, --path and --set-a/--set-b")
        words = program[1:] if program[0] in ("python", "python3") else program
        return Space(Side(pins=lists[0]), Side(pins=lists[1]), words, options["make"], options["what"])
    return _configured(configs, options, lists, Side, Space)


def _configured(configs: tuple[Path, ...], options: dict[str, Any], lists: list[Any], side: Any, space: Any) -> Any:
    from scenarios.config import load
    from scenarios.paths import path_info
    from tracer.interpreters import find

    if not options["path_name"]:
        raise BadUsage(
            "no path was given", "trace bisect a.toml b.toml --path mlx-lm; `trace record --path` knows the names"
        )
    if len(configs) > 2:
        raise BadUsage(f"{len(configs)} configurations were given: {shlex.join(map(str, configs))}", "give one or two")
    if len(configs) < 2 and not (options["across"] or options["pins"] or options["set_a"] or options["set_b"]):
        raise BadUsage("there is one configuration and nothing to change", "give B.toml, --across, --set-b or --pins")
    names = options["path_name"], options["across"] or options["path_name"]
    files = (configs[0] if configs else None, configs[-1] if configs else None)
    for name in names:
        path_info(name)
    sides = [
        side(name, load(file, options[key], base=path_info(name).base).flat(), pins)
        for name, file, key, pins in zip(names, files, ("set_a", "set_b"), lists, strict=True)
    ]
    python = str(find(options["python"])) if options["python"] else ""
    return space(*sides, (), options["make"] or "", options["what"], python)


def _pins(file: Path) -> dict[str, str]:
    from scenarios.bisect.space import read_pins

    try:
        return read_pins(file.read_text("utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise NotFound(f"{file} cannot be read: {error}", "give a file as `pip freeze` prints it") from error
