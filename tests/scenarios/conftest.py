from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scenarios.paths import PATHS
from tracer.interpreters import lent

Arms = Mapping[str, Mapping[str, Any]]
FAULT_STEPS = 3
# Looked for, not imported: the frameworks run in processes of their own.
needs_torch = pytest.mark.skipif(bool(PATHS["hf-trainer"].missing()), reason="needs the extra `torch`")
needs_mlx = pytest.mark.skipif(bool(PATHS["mlx"].missing()), reason="needs the extra `mlx`")
ROOT = Path(__file__).parents[2]
_MADE = ROOT / ".venv-unsloth" / "bin" / "python"
UNSLOTH = os.environ.get("TRACE_UNSLOTH_PYTHON") or (str(_MADE) if _MADE.exists() else "")
needs_unsloth = pytest.mark.skipif(
    not UNSLOTH, reason="needs an environment with unsloth_zoo: `make unsloth`, or TRACE_UNSLOTH_PYTHON=path/to/python"
)
# Paths that take given batches and share one environment.
FED = ("torch", "hf-trainer", "trl-sft", "mlx-lm", "mlx")


def run_many(path: str, arms: Arms, folder: Path, *, python: str | None = None) -> dict[str, Any]:
    """Run arms of one path in one process; one thread each is faster and changes no bit of these small models."""
    given, results = folder / f"{path}-arms.json", folder / f"{path}-results.json"
    given.write_text(json.dumps(arms, default=str))
    command = [python or sys.executable, "-W", "ignore", "-m", "tests.scenarios.many", path, str(given), str(results)]
    with lent(python) as ours:
        environment = {**os.environ, **ours, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(results.read_text()))


def run_paths(paths: Iterable[str], arms: Arms, folder: Path) -> dict[str, dict[str, Any]]:
    """The same arms on several paths, two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(paths, pool.map(lambda path: run_many(path, arms, folder), paths), strict=True))


Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once(name, make)`: a folder and what `make(folder)` returned (as JSON), made once for all pytest workers."""
    own = tmp_path_factory.getbasetemp()
    base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def made(name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        folder, done = base / name, base / f"{name}.json"
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                folder.mkdir(exist_ok=True)
                done.write_text(json.dumps(make(folder)))
        return folder, json.loads(done.read_text())

    return made


def record_all(path: str, arms: Mapping[str, Any], folder: Path, *, python: str | None = None) -> dict[str, str]:
    """Record every arm into `folder`; the traces by name."""
    files = {name: str(folder / f"{name.replace(' ', '-')}.h5") for name in arms}
    results = run_many(
        path, {name: {**given, "trace": files[name]} for name, given in arms.items()}, folder, python=python
    )
    assert not [result["error"] for result in results.values() if "error" in result]
    return files


def paths_of(files: Mapping[str, str]) -> dict[str, Path]:
    """Names -> paths, from what `record_all` returned."""
    return {name: Path(file) for name, file in files.items()}


def arm(
    settings: Mapping[str, Any], *, trace: Path | None = None, source: Path | None = None, batches: bool = True
) -> Any:
    """One arm; with `source` it starts from that trace's adapters and, with `batches`, trains on its batches."""
    shared = {"init_from": source, "batches_from": source if batches else None}
    return {"settings": settings, "trace": trace, **shared}


# Recorded PyTorch runs that others are compared with or fed from.
SOURCES: Arms = {
    "tiny-llama": {"train.steps": FAULT_STEPS},
    "long": {"train.steps": 10},
    "tiny-gemma3-64": {"model.name": "tiny-gemma3-64", "train.steps": 10},
    "tiny-gemma3-96": {"model.name": "tiny-gemma3-96", "train.steps": 2},
    "gemma": {"model.name": "tiny-gemma3-64", "train.steps": 1},
    "accumulated": {"train.steps": 3, "train.accumulation": 2, "data.order": "shuffled", "data.mask_label": [1, 4]},
}


@pytest.fixture(scope="session")
def sources(once: Once) -> dict[str, Path]:
    """Traces of SOURCES by name."""
    arms = {name: arm(settings) for name, settings in SOURCES.items()}
    return paths_of(once("sources", lambda folder: record_all("torch", arms, folder))[1])
