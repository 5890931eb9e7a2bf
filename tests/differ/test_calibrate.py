"""`trace calibrate`: a policy from twins, checked on those it has not seen."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from differ import DiffOptions, Verdict, diff
from differ.calibrate import calibrate, round_up
from differ.policy import load_policy
from tests.builders import make_trace
from tests.tracer.test_cli import only_line, trace
from tracer.errors import BadUsage
from tracer.reader import open_trace

LOUD = 3e-4


def family(folder: Path, *noises: float) -> tuple[Path, list[Path]]:
    run = make_trace(folder / "run.h5")
    return run, [make_trace(folder / f"twin-{i}.h5", noise=noise, noise_seed=i) for i, noise in enumerate(noises, 1)]


def test_a_policy_from_twins_lets_a_noisy_pair_pass_and_a_fault_not(tmp_path: Path) -> None:
    run, twins = family(tmp_path, LOUD, LOUD, LOUD)
    other = make_trace(tmp_path / "other.h5", noise=LOUD, noise_seed=9)
    wrong = make_trace(tmp_path / "wrong.h5", noise=LOUD, noise_seed=9, fault="grad_element")

    done = trace("calibrate", run, *twins, "-o", tmp_path / "policy.toml")

    assert done.returncode == 0, done.stderr
    assert "left out twin-2.h5: 0 false alarms in " in done.stdout
    assert "false alarms, leaving one out: 0 a record; 3 of 3 twins without any" in done.stdout
    assert only_line(done.stderr).startswith("trace: wrote ")
    options = DiffOptions(policy=load_policy(tmp_path / "policy.toml"))
    assert diff(run, other).verdict is Verdict.DIVERGED
    assert diff(run, other, options).verdict is Verdict.SAME
    assert diff(run, wrong, options).verdict is Verdict.DIVERGED


def test_a_twin_louder_than_the_others_is_counted_as_a_false_alarm(tmp_path: Path) -> None:
    run, twins = family(tmp_path, 1e-6, 1e-6, LOUD)
    with open_trace(run) as whole, open_trace(twins[0]) as a, open_trace(twins[1]) as b, open_trace(twins[2]) as loud:
        found = calibrate(whole, [a, b, loud], None)

    alarms = {check.name: check.alarms for check in found.checks}
    assert alarms["twin-1.h5"] == alarms["twin-2.h5"] == 0
    assert alarms["twin-3.h5"] > 0
    assert all(check.judged > 0 for check in found.checks)


@pytest.mark.parametrize("fault", ["lr", "batch_order", "init_draw", "init_names"])
def test_a_file_that_is_no_twin_is_refused(fault: str, tmp_path: Path) -> None:
    run, twins = family(tmp_path, LOUD)
    strange = make_trace(tmp_path / "strange.h5", fault=fault)
    with open_trace(run) as whole, open_trace(twins[0]) as twin, open_trace(strange) as other:
        with pytest.raises(BadUsage, match="no twin"):
            calibrate(whole, [twin, other], None)
        with pytest.raises(BadUsage, match="one twin"):
            calibrate(whole, [twin], None)


def test_an_existing_policy_is_not_replaced_unasked(tmp_path: Path) -> None:
    run, twins = family(tmp_path, LOUD, LOUD)
    policy = tmp_path / "policy.toml"
    policy.write_text("mine")
    done = trace("calibrate", run, *twins, "-o", policy)
    assert done.returncode == 2
    assert "--force" in only_line(done.stderr)
    assert policy.read_text() == "mine"


@pytest.mark.parametrize(
    ("value", "rounded"), [(0.0, 0.0), (1.234e-5, 1.3e-5), (0.999, 1.0), (2e-7, 2e-7), (math.inf, math.inf)]
)
def test_tolerances_are_rounded_up(value: float, rounded: float) -> None:
    assert round_up(value) == rounded
