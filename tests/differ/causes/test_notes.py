"""Notes: a systematic ratio within tolerance is said, never changes the verdict, and can be made to fail a gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from differ import Cause, DiffResult, Verdict
from differ.command import diff as command
from tests.builders import F32
from tests.differ.causes.plant import causes, edited, mirrored, scaled, with_data
from tests.differ.conftest import Compare
from tracer.schema import Phase

# Gradients may differ by 1e-3 here, so that a ratio of 1.0003 passes.
LOOSE = '[[rule]]\nphase = "grad"\nbase = 1e-3\n[[rule]]\nphase = "loss"\nbase = 1e-3\n'


def systematic(result: DiffResult) -> list[Cause]:
    return [note for note in result.notes if note.explains is not None]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(LOOSE)
    return path


def options(policy: Path) -> Any:
    from differ import DiffOptions
    from differ.policy import load_policy

    return DiffOptions(policy=load_policy(policy))


@pytest.mark.parametrize(
    ("factor", "shown"), [(1.0003, 1.0003), (0.99976, 0.99976), (1.00001, 1.00001), (1.000136, 1.000136)]
)
def test_a_ratio_in_all_gradients_is_noted_to_three_digits(
    factor: float, shown: float, compare: Compare, policy: Path
) -> None:
    result = compare(b={"tamper": scaled(factor)}, options=options(policy))

    assert result.verdict is Verdict.SAME
    (note,) = systematic(result)
    assert (note.id, note.step, note.phase) == ("grad.scale", 1, "grad")
    assert note.parameters is not None
    assert note.parameters["factor"] == pytest.approx(shown, abs=abs(shown - 1) * 5e-3)
    assert result.causes == ()


def test_the_note_is_printed_with_its_factor(compare: Compare, policy: Path) -> None:
    result = compare(b={"tamper": scaled(1.0003)}, options=options(policy))

    (note,) = systematic(result)
    assert "1.000300 times as large in b" in note.summary


def test_the_ratio_is_inverse_with_a_and_b_in_each_others_place(compare: Compare, tmp_path: Path) -> None:
    compare(b={"tamper": scaled(1.00001)})

    (note,) = systematic(mirrored(tmp_path))
    assert note.parameters is not None
    assert note.parameters["deviation"] == pytest.approx(-1e-5, rel=0.05)


def test_a_ratio_that_begins_late_has_its_step(compare: Compare, policy: Path) -> None:
    result = compare(b={"tamper": scaled(1.0003, at=range(3, 9))}, options=options(policy), steps=5)

    (note,) = systematic(result)
    assert note.step == 3


def test_a_ratio_in_all_losses_is_noted(compare: Compare, policy: Path) -> None:
    slightly = edited(Phase.LOSS, lambda one: with_data(one, one.data * F32(1.0002)))

    result = compare(b={"edit": slightly}, options=options(policy))

    (note,) = systematic(result)
    assert (note.id, note.phase) == ("loss.reduction", "loss")
    assert note.parameters is not None
    assert note.parameters["factor"] == pytest.approx(1.0002, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_rounding_noise_is_no_note(seed: int, compare: Compare) -> None:
    assert systematic(compare(noise_seed=seed, steps=6)) == []


@pytest.mark.parametrize("noise", [1e-5, 1e-4])
def test_larger_noise_is_no_note_either(noise: float, compare: Compare, policy: Path) -> None:
    assert systematic(compare(noise=noise, options=options(policy), steps=6)) == []


def test_a_ratio_in_one_parameter_is_not_systematic(compare: Compare, policy: Path) -> None:
    def one(step: int, grads: dict[str, np.ndarray]) -> None:
        jitter = np.random.default_rng(step)
        for name in grads:
            grads[name] = (grads[name] * F32(1 + 3e-4 * jitter.normal())).astype(F32)

    assert systematic(compare(b={"tamper": one}, options=options(policy))) == []


def test_a_note_stands_beside_a_divergence_that_comes_after_it(compare: Compare, policy: Path) -> None:
    result = compare("bias_correction", b={"tamper": scaled(1.0003)}, options=options(policy))

    assert result.verdict is Verdict.DIVERGED
    assert [note.id for note in systematic(result)] == ["grad.scale"]
    assert causes(result, "optimizer.bias_correction")


def test_fail_on_note_exits_with_one_for_a_systematic_note_only(compare: Compare, policy: Path, tmp_path: Path) -> None:
    compare(b={"tamper": scaled(1.0003)}, options=options(policy))
    pair = [str(tmp_path / "a.h5"), str(tmp_path / "b.h5"), "--policy", str(policy), "-q"]

    assert _exit(pair) == 0
    assert _exit([*pair, "--fail-on", "note"]) == 1
    assert _exit([*pair, "--fail-on", "note", "--exit-zero"]) == 0


def test_fail_on_note_passes_runs_without_one(compare: Compare, tmp_path: Path) -> None:
    compare(declared={"seed": 1}, b={"declared": {"seed": 2}})
    pair = [str(tmp_path / "a.h5"), str(tmp_path / "b.h5"), "-q", "--fail-on", "note"]

    assert _exit(pair) == 0


def _exit(arguments: list[str]) -> int:
    result = CliRunner().invoke(command, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code
