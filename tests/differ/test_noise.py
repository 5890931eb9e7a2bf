"""The noise floor: measured from twins, wider than what they show by no more than the policy says, and blind to no fault."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from differ import DiffOptions, DiffResult, Verdict, diff
from differ.noise import Envelope
from differ.policy import load_policy
from tests.builders import FAULTS, make_trace
from tests.tracer.test_cli import trace as command
from tracer.errors import BadConfig, BadUsage
from tracer.reader import open_trace
from tracer.schema import Phase
from tracer.shrink import shrink

FOLDER = Path(tempfile.mkdtemp(prefix="noise-"))
EXAMPLES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
# Rounding noise beyond what the defaults allow in float32, as a run in lower precision would have.
LOUD = 3e-4


@functools.cache
def made(fault: str | None = None, noise: float = LOUD, noise_seed: int = 0, **more: Any) -> Path:
    name = f"{fault}-{noise}-{noise_seed}-{'-'.join(f'{k}={v}' for k, v in more.items())}.h5"
    return make_trace(FOLDER / name, fault=fault, noise=noise, noise_seed=noise_seed, **more)


def twins(*seeds: int) -> tuple[Path, ...]:
    return tuple(made(None, LOUD, seed) for seed in seeds)


@functools.cache
def compared(fault: str | None, *seeds: int, noise: float = LOUD) -> DiffResult:
    return diff(made(None, 0.0), made(fault, noise), DiffOptions(noise=twins(*seeds)))


def notes(result: DiffResult) -> list[str]:
    return [note.id for note in result.notes if note.id.startswith("noise.")]


def test_a_pair_as_noisy_as_its_twins_is_the_same_and_diverges_without_them() -> None:
    assert compared(None).verdict is Verdict.DIVERGED
    result = compared(None, 1, 2)

    assert result.verdict is Verdict.SAME
    assert 0.0 < result.margin < 1.0
    assert [Path(path) for path in result.policy.noise] == list(twins(1, 2))


@pytest.mark.parametrize(
    ("fault", "phase"),
    [
        ("lr", "hparams"),
        ("batch_order", "batch"),
        ("clip_value", "clipped_grad"),
        ("moment", "opt_state"),
        ("param_element", "param"),
        ("bias_correction", "param"),
        ("grad_element", "grad"),
        ("loss_factor", "loss"),
        ("eval", "eval"),
        ("init_names", "init"),
    ],
)
def test_noise_files_hide_no_fault_and_add_no_other(fault: str, phase: str) -> None:
    result = compared(fault, 1, 2)

    assert result.first is not None
    assert result.first.phase == phase
    assert (
        result.first.required is None
        or result.first.tolerance is None
        or result.first.required > result.first.tolerance
    )


def test_a_wrong_learning_rate_is_the_only_finding_although_everything_after_it_differs() -> None:
    assert {finding.phase for finding in compared("lr", 1, 2).findings} == {"hparams"}


def test_a_user_s_own_rule_knows_better_than_the_noise(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('[[rule]]\nphase = "grad"\nbase = 1e-6\n')
    options = DiffOptions(noise=twins(1, 2), policy=load_policy(tmp_path / "policy.toml"))

    assert diff(made(None, 0.0), made(None, LOUD), options).verdict is Verdict.DIVERGED


def test_a_silent_a_short_and_a_strange_noise_file_are_said(tmp_path: Path) -> None:
    a, b = made(None, 0.0), made(None, LOUD)

    assert notes(diff(a, b, DiffOptions(noise=(make_trace(tmp_path / "same.h5"),)))) == ["noise.silent"]
    assert notes(diff(a, b, DiffOptions(noise=(made(None, LOUD, 1, steps=2),)))) == ["noise.short"]
    for strange in ({"lr": 0.02}, {"seed": 5}, {"init_seed": 5}, {"scale": 4.0}, {"layers": (1, 2)}):
        result = diff(a, b, DiffOptions(noise=(made(None, LOUD, 1, **strange),)))
        assert notes(result) == ["noise.unused"], strange
        assert result.verdict is Verdict.DIVERGED


def test_a_side_that_no_longer_trains_as_its_twin_did_is_a_divergence_and_no_error() -> None:
    result = diff(made(None, 0.0), made("init_draw", LOUD), DiffOptions(noise=twins(1)))
    assert result.first is not None
    assert result.first.phase == "init"


def test_fingerprints_are_judged_by_the_noise_of_fingerprints_too(tmp_path: Path) -> None:
    small = []
    for path in (made(None, LOUD), *twins(1, 2)):
        with open_trace(path) as whole:
            shrink(whole, tmp_path / path.name)
        small.append(tmp_path / path.name)
    b, *noise = small

    assert diff(made(None, 0.0), b).verdict is Verdict.DIVERGED
    assert diff(made(None, 0.0), b, DiffOptions(noise=tuple(noise))).verdict is Verdict.SAME


@pytest.mark.parametrize("other", [{"observed": {"framework": "torch"}}, {"base_dtype": "bfloat16"}])
def test_a_twin_of_neither_side_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    strange = make_trace(tmp_path / "strange.h5", **other)
    with pytest.raises(BadUsage, match="twin of neither side"):
        diff(made(None, 0.0), made(None, LOUD), DiffOptions(noise=(strange,)))


@pytest.mark.parametrize("text", ["[noise]\nsafty = 1\n", "[noise]\nquantile = 1.5\n", "[noise]\nsafety = -1\n"])
def test_noise_settings_that_mean_nothing_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(BadConfig, match="noise"):
        load_policy(tmp_path / "policy.toml")


def test_less_safety_finds_what_more_lets_pass(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("[noise]\nsafety = 0.1\nreach = 1\n")
    tight = DiffOptions(noise=twins(1, 2), policy=load_policy(tmp_path / "policy.toml"))
    assert diff(made(None, 0.0), made(None, LOUD), tight).verdict is Verdict.DIVERGED


def test_the_command_takes_several_noise_files_and_lists_them() -> None:
    files = [word for twin in twins(1, 2) for word in ("--noise", twin)]
    done = command("diff", made(None, 0.0), made(None, LOUD), *files, "--format", "json")

    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["policy"]["noise"] == [str(twin) for twin in twins(1, 2)]


# Properties.

kinds = st.sampled_from(["lora_A.weight", "lora_B.weight", "bias"])
names = st.builds("model.layers.{}.q_proj.{}".format, st.integers(0, 2), kinds)
steps = st.lists(st.dictionaries(names, st.floats(0.0, 2.0)), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(steps, st.floats(0.0, 1.0))
def test_the_envelope_never_falls_and_covers_every_twin(distances: list[dict[str, float]], quantile: float) -> None:
    envelope = Envelope(quantile)
    before: dict[str, float] = {}
    for step in distances:
        envelope.grow(step)
        level = envelope.level()
        now = {name: level.of(name) for name in {*before, *step}}
        assert all(now[name] >= value for name, value in before.items() if name in now)
        assert all(now[name] >= value for name, value in step.items())
        assert all(
            value >= level.family[name[name.rindex(".l") :] if "lora" in name else ""] for name, value in now.items()
        )
        before |= now


faults = st.sampled_from([None, *sorted(set(FAULTS) - {"init_cast"})])
quiet = st.sampled_from([3e-7, LOUD])


@EXAMPLES
@given(faults, quiet, st.sampled_from([1, 2]))
def test_one_noise_file_more_never_makes_same_diverged_nor_comes_earlier(
    fault: str | None, noise: float, more: int
) -> None:
    few, many = compared(fault, 3, noise=noise), compared(fault, 3, *range(1, more + 1), noise=noise)

    assert not (few.verdict is Verdict.SAME and many.verdict is Verdict.DIVERGED)
    if many.first is not None:
        assert few.first is not None
        order = [(found.step, Phase.parse(found.phase)) for found in (few.first, many.first)]
        assert order[0] <= order[1]


@EXAMPLES
@given(faults, quiet)
def test_a_trace_is_the_same_as_itself_with_noise_files_too(fault: str | None, noise: float) -> None:
    result = diff(made(fault, noise), made(fault, noise), DiffOptions(noise=twins(1)))
    assert result.verdict is Verdict.SAME
    assert result.findings == ()


@EXAMPLES
@given(faults, quiet)
def test_findings_mirror_with_noise_files_too(fault: str | None, noise: float) -> None:
    options = DiffOptions(noise=twins(1))
    there = diff(made(None, 0.0), made(fault, noise), options)
    back = diff(made(fault, noise), made(None, 0.0), options)
    assert [f.rel_l2 for f in there.findings] == [f.rel_l2 for f in back.findings]
    assert [f.tolerance for f in there.findings] == [f.tolerance for f in back.findings]
    assert there.counts == back.counts
