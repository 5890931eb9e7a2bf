"""Run by every Python that a recorded program starts; it lets those that are ranks of a distributed run record themselves.

The folder of this file is put in front of PYTHONPATH.  It hides no `sitecustomize` of the installation's (that one runs first),
does nothing in a process that has no rank, and never raises.  Standard library only, Python 3.6 and later.
"""

import os
import sys

TASK = "STEPTRACE_CHILDREN"
# The last one is what `accelerate launch` tells the one process that it starts without a rank.
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MLX_RANK", "ACCELERATE_MIXED_PRECISION")


def _run_the_hidden_one() -> None:
    """Import the module that this one stands before on the path, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != here]
    ours = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        # The import that is under way looks for a module of this name.
        if ours is not None:
            sys.modules.setdefault("sitecustomize", ours)


def _join() -> None:
    if TASK not in os.environ or not any(name in os.environ for name in RANKS):
        return
    try:
        from tracer.children import join
    except ImportError as error:
        sys.stderr.write(f"trace: this rank is not recorded: {sys.executable} has no recorder ({error})\n")
        return
    join()


try:
    _run_the_hidden_one()
finally:
    try:
        _join()
    except Exception as error:  # noqa: BLE001 - the run must go on
        sys.stderr.write(f"trace: this rank is not recorded: {error}\n")
