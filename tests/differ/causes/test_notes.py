"""Notes: a systematic ratio within tolerance is said, never changes the verdict, and can be made to fail a gate."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from differ import Cause, DiffOptions, DiffResult, Verdict, diff
from differ.command import diff as command
from differ.policy import default_policy
from tests.builders import F32, make_trace
from tests.differ.causes.plant import B, causes, edited, mirrored, scaled, with_data
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


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1.0003, 0.99976])
def test_a_small_ratio_in_all_gradients_is_a_note_whatever_rounding_allows(
    factor: float, base_dtype: str, compare: Compare, tmp_path: Path
) -> None:
    result = compare(b={"tamper": scaled(factor)}, base_dtype=base_dtype)

    assert result.verdict is Verdict.SAME
    (note,) = systematic(result)
    assert (note.id, note.step, note.phase) == ("grad.scale", 1, "grad")
    assert note.parameters is not None
    assert note.parameters["factor"] == pytest.approx(factor, abs=2e-6)
    assert note.explains is not None
    assert note.explains > 0.99
    pair = [str(tmp_path / "a.h5"), str(tmp_path / "b.h5"), "-q"]
    assert (_exit(pair), _exit([*pair, "--fail-on", "note"])) == (0, 1)

    (back,) = systematic(mirrored(tmp_path))
    assert back.parameters is not None
    assert back.parameters["factor"] == pytest.approx(1 / factor, abs=2e-6)


def test_a_small_ratio_says_what_let_it_pass(compare: Compare) -> None:
    (note,) = systematic(compare(b={"tamper": scaled(1.0003)}))

    # lora_A has none yet.
    assert note.summary == (
        "systematic but small: all gradients (3) are 1.000300 times as large in b; rounding allows 4e-05, "
        "[notes] systematic 0.0005"
    )


def test_a_ratio_beyond_the_policy_s_limit_diverges(compare: Compare) -> None:
    result = compare(b={"tamper": scaled(1.0006)})

    assert [cause.id for cause in result.causes] == ["grad.scale"]
    assert systematic(result) == []


def test_a_small_ratio_diverges_where_the_policy_has_no_room_for_it(compare: Compare, tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text("[notes]\nsystematic = 0\n")

    result = compare(b={"tamper": scaled(1.0003)}, options=options(strict))

    assert [cause.id for cause in result.causes] == ["grad.scale"]


def test_a_small_ratio_diverges_where_a_user_s_own_rule_says_so(compare: Compare, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('[[rule]]\nphase = "grad"\nbase = 5e-5\n')

    assert compare(b={"tamper": scaled(1.0003)}, options=options(own)).verdict is Verdict.DIVERGED


def test_a_wider_rule_for_one_gradient_makes_no_finding_of_the_others(compare: Compare, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(f'[[rule]]\nphase = "grad"\nname = "{B[0]}"\nbase = 1e-2\n')

    result = compare(b={"tamper": scaled(1.0003)}, options=options(own))

    assert result.verdict is Verdict.SAME
    (note,) = systematic(result)
    assert B[0] not in note.names
    assert B[1] in note.names


def test_a_small_ratio_is_a_note_of_the_gradients_that_were_asked_for(compare: Compare) -> None:

    result = compare(b={"tamper": scaled(1.0003)}, options=DiffOptions(only=("*layers.[01].*",)))

    assert result.verdict is Verdict.SAME
    assert [note.id for note in systematic(result)] == ["grad.scale"]


def test_a_small_ratio_of_some_gradients_is_no_systematic_effect(compare: Compare) -> None:
    assert compare(b={"tamper": scaled(1.0003, names="layers.1")}).verdict is Verdict.DIVERGED


def test_a_ratio_that_is_another_at_every_step_is_found(compare: Compare) -> None:
    def drifting(step: int, grads: dict[str, np.ndarray]) -> None:
        for name in grads:
            grads[name] = (grads[name] * F32(1 + (3e-4 if step == 1 else -3e-4))).astype(F32)

    result = compare(b={"tamper": drifting})

    assert result.first is not None
    assert (result.first.step, result.first.phase) == (2, "grad")


def test_another_fault_beside_a_small_ratio_is_found(compare: Compare) -> None:
    def both(step: int, grads: dict[str, np.ndarray]) -> None:
        scaled(1.0003)(step, grads)
        for name, gradient in grads.items():
            if step == 2 and "layers.1" in name and "lora_B" in name:
                gradient.reshape(-1)[3] += F32(0.01)

    result = compare(b={"tamper": both})

    assert result.first is not None
    assert (result.first.step, result.first.phase) == (2, "grad")
    assert result.first.name is not None
    assert "layers.1" in result.first.name


def test_a_wider_tolerance_makes_no_divergence_of_a_ratio_that_was_excused(tmp_path: Path) -> None:
    beyond = itertools.cycle((3.957e-5, 1.8679e-4, 4.09415e-4))

    def uneven(_: int, grads: dict[str, np.ndarray]) -> None:
        for name, by in zip(grads, beyond, strict=False):
            grads[name] = (grads[name] * F32(1 + by)).astype(F32)

    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", tamper=uneven, noise=3e-7)
    # Their ratio is half of what 9.4 times the default allows; the largest is within 10.3 times as it is.
    verdicts = [diff(a, b, widened(times)).verdict for times in (5.0, 7.0, 9.2, 9.6, 10.0, 10.6, 20.0)]
    assert verdicts == sorted(verdicts, key=lambda verdict: verdict is Verdict.SAME)
    assert verdicts[0] is Verdict.DIVERGED
    assert verdicts[-1] is Verdict.SAME


def test_a_ratio_of_everything_is_excused_under_every_tolerance(tmp_path: Path) -> None:
    a, b = make_trace(tmp_path / "a.h5"), make_trace(tmp_path / "b.h5", tamper=scaled(1.0003), noise=3e-7)
    for times in (0.5, 1, 5, 7, 7.5, 8, 15):
        assert diff(a, b, widened(times)).verdict is Verdict.SAME


def widened(times: float) -> DiffOptions:
    """The default policy with a wider base for gradients."""
    policy = default_policy()
    tables = {
        key: replace(tolerance, base=tolerance.base * times) if key[0] == "grad" else tolerance
        for key, tolerance in policy.tables.items()
    }
    return DiffOptions(policy=replace(policy, tables=tables))


def test_a_wider_rule_for_one_of_two_gradients_makes_no_finding_of_the_other(compare: Compare, tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text(f'[[rule]]\nphase = "grad"\nname = "{B[0]}"\nbase = 1e-2\n')
    planted = {"tamper": scaled(1.0003)}

    assert compare(b=planted, layers=(0, 1), depth=2).verdict is Verdict.SAME
    assert compare(b=planted, layers=(0, 1), depth=2, options=options(own)).verdict is Verdict.SAME
