"""`trace paths`: which training paths work here, why the others do not, and the command that would change that.

Nothing is imported to find out: a path works if what it needs can be found.  `trace selftest` runs them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from typing import Any, Final

import click

from scenarios.paths import PATHS, PathInfo
from tracer.errors import BadUsage
from tracer.interpreters import find, lent

FORMAT: Final = 1
# Modules whose versions are worth a column; the others come with them.
_SHOWN: Final = ("torch", "transformers", "peft", "trl", "mlx", "mlx_lm", "unsloth_zoo")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--python", metavar="PYTHON", help="What works under the interpreter of another environment.")
def paths(as_json: bool, python: str | None) -> int:
    """Which training paths work here, and the command that would make the others work.

    \b
    trace paths
    trace paths --python .venv-unsloth/bin/python

    Exit codes: 0 at least one works, 2 none does.
    """
    found = here() if python is None else there(python)
    click.echo(json.dumps(found, indent=2, sort_keys=True) if as_json else table(found))
    return 0 if any(path["works"] for path in found["paths"]) else 2


def here() -> dict[str, Any]:
    """What `--json` prints: format, Python, and per path name, summary, works, missing, fix, versions."""
    return {
        "format": FORMAT,
        "python": platform.python_version(),
        "paths": [_describe(info) for info in PATHS.values()],
    }


def there(python: str) -> dict[str, Any]:
    """The same of another interpreter; raises NotFound or BadUsage."""
    interpreter = str(find(python))
    with lent(interpreter) as environment:
        program = "import json; from scenarios.paths_command import here; print(json.dumps(here()))"
        done = subprocess.run(
            [interpreter, "-c", program], capture_output=True, text=True, env={**os.environ, **environment}
        )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BadUsage(f"{python} cannot list its paths: {said}", f"{python} -m pip install steptrace")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _describe(info: PathInfo) -> dict[str, Any]:
    missing = info.missing()
    versions = {name: _version(name) for name in info.needs if name in _SHOWN and name not in missing}
    return {
        "name": info.name,
        "summary": info.summary,
        "works": not missing,
        "missing": list(missing),
        "fix": info.fix if missing else "",
        "versions": {name: version for name, version in versions.items() if version},
    }


def _version(module: str) -> str:
    """Version of the distribution that a module comes with, empty where that is not known."""
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return ""


def table(found: dict[str, Any]) -> str:
    """The answer in words, a path a line."""
    lines = [f"Python {found['python']}"]
    wide = max(len(path["summary"]) for path in found["paths"])
    for path in found["paths"]:
        versions = ", ".join(f"{name} {version}" for name, version in path["versions"].items())
        reason = versions if path["works"] else f"needs {', '.join(path['missing'])}: {path['fix']}"
        lines.append(f"{path['name']:<12} {'works' if path['works'] else 'no':<6} {path['summary']:<{wide}}  {reason}")
    return "\n".join(lines)
