"""Tolerances: every default is there, a user's file overrides by name, phase and dtype, and nonsense is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from differ import DiffOptions, Verdict
from differ.policy import Policy, default_policy, load_policy
from tests.differ.conftest import Compare
from tracer.dtypes import EPSILON
from tracer.errors import BadConfig, NotFound
from tracer.schema import Phase


def policy(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return load_policy(path)


@pytest.mark.parametrize("dtype", EPSILON)
@pytest.mark.parametrize("phase", [p for p in Phase if p not in (Phase.CONFIG, Phase.HPARAMS, Phase.BATCH)])
def test_every_computed_phase_has_a_default_for_every_dtype(phase: Phase, dtype: str) -> None:
    tolerance = default_policy().tolerance(phase, dtype, "x")
    assert 0.0 < tolerance.base < 1.0
    assert tolerance.judges(0.0)


def test_a_coarser_dtype_never_has_a_tighter_tolerance() -> None:
    dtypes = sorted(EPSILON, key=EPSILON.__getitem__)
    for phase in (Phase.FORWARD, Phase.LOSS, Phase.GRAD, Phase.PARAM):
        bases = [default_policy().tolerance(phase, dtype, "x").base for dtype in dtypes]
        assert bases == sorted(bases)


def test_a_tolerance_grows_with_the_distance_of_the_inputs_and_ends_at_its_bound() -> None:
    tolerance = default_policy().tolerance(Phase.GRAD, "float32", "x")
    assert tolerance.at(1e-3) > tolerance.at(0.0)
    assert tolerance.judges(tolerance.bound)
    assert not tolerance.judges(tolerance.bound * 1.01)


def test_the_last_matching_rule_wins(tmp_path: Path) -> None:
    chosen = policy(
        tmp_path,
        '[[rule]]\nphase = "grad"\nbase = 0.1\n[[rule]]\nname = "*.lora_B.*"\nphase = "grad"\ndtype = "float32"\nbase = 0.2\n',
    )
    assert chosen.tolerance(Phase.GRAD, "float32", "a.lora_B.weight").base == 0.2
    assert chosen.tolerance(Phase.GRAD, "float32", "a.lora_A.weight").base == 0.1
    assert chosen.tolerance(Phase.GRAD, "bfloat16", "a.lora_B.weight").base == 0.1
    assert not chosen.tolerance(Phase.LOSS, "float32", "loss").explicit


def test_a_table_replaces_the_defaults_it_names(tmp_path: Path) -> None:
    chosen = policy(tmp_path, "[grad.float32]\nbase = 0.5\n")
    assert chosen.tolerance(Phase.GRAD, "float32", "x").base == 0.5
    assert (
        chosen.tolerance(Phase.GRAD, "float32", "x").bound
        == default_policy().tolerance(Phase.GRAD, "float32", "x").bound
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grad.float32]\nbse = 1\n", "unknown setting 'bse'"),
        ("[gard.float32]\nbase = 1\n", "unknown section"),
        ("[grad.float33]\nbase = 1\n", "not a dtype"),
        ("[grad.float32]\nbase = -1\n", "0 or more"),
        ('[grad.float32]\nbase = "x"\n', "0 or more"),
        ("[grad.float32]\nbase = nan\n", "0 or more"),
        ("[[rule]]\nname = 'x'\n", "sets nothing"),
        ("[[rule]]\nnam = 'x'\nbase = 1\n", "unknown setting 'nam'"),
        ("[[rule]]\nname = 3\nbase = 1\n", "must be a glob"),
        ("rule = 3\n", "list of tables"),
        ("[exact]\nhparms = 1\n", "unknown setting 'hparms'"),
        ("grad = 3\n", "needs a dtype"),
        ("[[", "not TOML"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=message):
        policy(tmp_path, text)


def test_a_policy_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_policy(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("lr", 'phase = "hparams"\nname = "*.lr"\nbase = 0.02'),
        ("param_element", 'phase = "param"\nbase = 0.1'),
        ("clip_norm", 'phase = "clipped_grad"\nbase = 2'),
        ("eval", 'phase = "eval"\nname = "score"\nbase = 0.02'),
    ],
)
def test_a_user_s_tolerance_lets_a_difference_pass(fault: str, rule: str, compare: Compare, tmp_path: Path) -> None:
    options = DiffOptions(policy=policy(tmp_path, f"[[rule]]\n{rule}\n"))

    result = compare(fault, options=options)

    assert result.verdict is Verdict.SAME, result.first
    assert result.policy.file is not None
    assert compare(fault).verdict is Verdict.DIVERGED
