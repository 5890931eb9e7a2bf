"""What a `trace diff` loads: the parts that this comparison needs, so that two small traces take mostly numpy and h5py."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from differ.causes import FINDERS
from tests.builders import make_trace
from tracer.loading import without_collection
from tracer.schema import Phase

# What asks in any comparison: for settings that differ, and for notes, one of which is `loss_precision`'s.
ALWAYS = {"config_differs", "loss_precision"}
# Parts that only an option, a fingerprint, ranks or outputs of modules need.
SPECIAL = {"differ.collect", "differ.noise", "differ.ranks", "differ.reference", "differ.matching", "tracer.ranks"}


def loaded(a: Path, b: Path, *options: str) -> set[str]:
    """Names of the modules that are loaded after a comparison in a process of its own."""
    program = (
        "import sys\n"
        "from differ.command import diff\n"
        f"diff.main({[str(a), str(b), '--quiet', *options]!r}, standalone_mode=False)\n"
        "print(*(name for name in sys.modules if name.startswith(('differ', 'tracer'))))\n"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "", "PYTHONPATH": root}, check=True)
    return set(done.stdout.split())


def finders(modules: set[str]) -> set[str]:
    return {name for name in FINDERS if f"differ.causes.{name}" in modules} - ALWAYS


def test_two_traces_that_agree_load_no_cause_and_nothing_special(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", noise=3e-7)
    modules = loaded(a, b)

    assert "differ.judges.optimizer" in modules
    assert finders(modules) == set()
    assert modules & SPECIAL == set()


def test_a_divergence_loads_the_causes_of_its_phase_alone(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", fault="lr")

    assert (
        finders(loaded(a, b)) == {name for name, about in FINDERS.items() if about and Phase.HPARAMS in about} - ALWAYS
    )


def test_an_option_loads_what_it_needs(tmp_path: Path) -> None:
    a = make_trace(tmp_path / "a.h5")
    html = tmp_path / "report.html"

    assert loaded(a, a, "--report", f"html={html}") & SPECIAL == {"differ.collect"}


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with without_collection():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        with pytest.raises(ImportError), without_collection():
            raise ImportError
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()
