"""`python -m scenarios.run PATH --config run.toml`: one training run on one path, in this process.

An ordinary program: it tells `tracer.declare` its settings and trains.  Whether anything records it is not its business.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import click

import tracer
from scenarios.config import load
from scenarios.feed import make_feed
from scenarios.outcome import Outcome
from scenarios.paths import path_info
from tracer.errors import TraceError


@click.command()
@click.argument("path")
@click.option("--config", type=click.Path(path_type=Path), help="Run configuration (TOML); without it, all defaults.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting: optimizer.lr=1e-3.")
@click.option("--model", help="Tiny model, local folder or hub id; the same as --set model.name=…")
@click.option("--init-from", type=click.Path(path_type=Path), help="Start from the adapters of this trace's step 0.")
@click.option("--batches-from", type=click.Path(path_type=Path), help="Train on the batches of this trace.")
@click.option("--outcome", type=click.Path(path_type=Path), help="Write digests of what the run ended with (JSON).")
def main(
    path: str,
    config: Path | None,
    overrides: tuple[str, ...],
    model: str | None,
    init_from: Path | None,
    batches_from: Path | None,
    outcome: Path | None,
) -> None:
    """Train once on PATH; `trace paths` lists them."""
    # PEFT reads an attribute that transformers 5 has renamed: nothing that who runs a built-in path can do anything about.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        result = run(path, config, overrides, model=model, init_from=init_from, batches_from=batches_from)
    except TraceError as error:
        click.echo(f"trace: {error.line()}", err=True)
        sys.exit(error.exit_code)
    if outcome is not None:
        outcome.write_text(json.dumps(result.summary(), indent=2, sort_keys=True) + "\n", "utf-8")


def run(
    path: str,
    config: Path | None = None,
    overrides: tuple[str, ...] = (),
    *,
    model: str | None = None,
    init_from: Path | None = None,
    batches_from: Path | None = None,
) -> Outcome:
    """Load the configuration, declare it, make the feed, train.  Raises a TraceError for bad input."""
    info = path_info(path)
    settings = load(config, overrides, model=model, base=info.base)
    module = info.load()
    tracer.declare(path=path, **settings.flat())
    # In a hybrid the batches are made where the loop is.
    loop = info if settings.parts.loop == "path" else path_info(settings.parts.loop)
    feed = make_feed(settings, init_from=init_from, batches_from=batches_from, own_batching=loop.own_batching)
    return module.run(settings, feed)


if __name__ == "__main__":
    main()
