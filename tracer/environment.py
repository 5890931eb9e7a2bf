"""What a trace says about where it was made: versions, device, threads, system, commit, arguments.

Stored beside the phases and shown when it differs; it never decides a verdict.  Must not import a framework: versions are
read from what the program has imported.  Host names, user names, tokens and absolute home paths are left out.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from tracer.place import launch, place

DISTRIBUTIONS: Final = (
    "numpy", "h5py", "torch", "transformers", "peft", "trl", "accelerate", "mlx", "mlx_lm", "unsloth_zoo"
)  # fmt: skip
THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
_SECRET_OPTION: Final = re.compile(r"(token|password|secret|api[-_]?key|credential)", re.IGNORECASE)
_SECRET_VALUE: Final = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|wandb_)[A-Za-z0-9_\-]{8,}")


def environment() -> dict[str, Any]:
    """The environment of this process, as the JSON document `env`."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        "versions": _versions(),
        "device": _device(),
        "commit": _commit(),
        "argv": scrub(sys.argv),
        **_rank(),
    }


def _rank() -> dict[str, Any]:
    """Which process of several this is; nothing for one that is alone."""
    here = place()
    if here is None:
        return {}
    return {"rank": here.rank, "world_size": here.world_size, "launch": launch()}


def scrub(arguments: list[str]) -> list[str]:
    """Arguments without secrets and without the home folder's path."""
    home, clean, hide = str(Path.home()), [], False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if hide:
            clean.append("***")
            hide = False
            continue
        if option.startswith("-") and _SECRET_OPTION.search(option):
            hide = not equals
            clean.append(f"{option}=***" if equals else option)
            continue
        text = _SECRET_VALUE.sub("***", argument)
        clean.append(re.sub(rf"{re.escape(home)}(?=/|$)", "~", text) if len(home) > 1 else text)
    return clean


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        if name in sys.modules:
            try:
                versions[name] = metadata.version(name.replace("_", "-"))
            except metadata.PackageNotFoundError:
                versions[name] = str(getattr(sys.modules[name], "__version__", "unknown"))
    return versions


def _device() -> str:
    torch, mlx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    if mlx is not None:
        return f"mlx {mlx.default_device()}"
    if torch is not None and torch.cuda.is_available():
        return f"cuda {torch.cuda.get_device_name()}"
    return "cpu" if torch is not None else "none"


def _commit() -> str:
    """Commit of the working folder's git checkout, `+` if it has changes; empty if there is none."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""
