"""The registry: every cause is documented, and of several claims the best one is shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from differ import causes
from differ.causes import FINDERS, NOTES, ids, module_of
from differ.causes.fit import RatioFit, Sums, explained_share
from differ.causes.select import choose, covers
from differ.result import Cause, Finding, Kind

PAGE = Path(__file__).parents[3] / "docs" / "causes.md"
FINDING = Finding(1, "grad", "w", Kind.VALUE)


def claim(cause_id: str, explains: float | None, *names: str, step: int = 1, phase: str = "grad") -> Cause:
    return Cause(cause_id, "", None, step, phase, names or ("w",), {}, explains)


def test_every_cause_has_a_heading_in_the_documentation() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name for heading in headings for name in re.findall(r"`([a-z_.]+)`", heading)}

    assert set(ids()) - documented == set()
    assert documented - set(ids()) == set()


@pytest.mark.parametrize("finder", FINDERS)
def test_every_cause_states_its_ids_and_its_formula(finder: str) -> None:
    module = module_of(finder)
    assert module.__doc__
    known = getattr(module, "IDS", None) or (module.ID,)
    assert all(f"`{name}`" in module.__doc__ for name in known)


def test_every_module_with_a_cause_is_registered() -> None:
    modules = {path.stem for path in Path(causes.__file__).parent.glob("*.py")}
    finders = {name for name in modules - {"__init__"} if hasattr(module_of(name), "find")}

    assert finders == {*FINDERS, *NOTES}


def test_the_larger_share_wins() -> None:
    assert [cause.id for cause in choose([claim("x", 0.991), claim("y", 0.999)], [FINDING])] == ["y"]


def test_of_equal_shares_the_one_registered_first_wins() -> None:
    assert [cause.id for cause in choose([claim("x", 0.99991), claim("y", 1.0)], [FINDING])] == ["x"]


def test_less_than_the_limit_is_not_shown() -> None:
    assert choose([claim("x", 0.9899)], [FINDING]) == ()


def test_a_claim_that_was_not_tested_yields_to_one_that_was() -> None:
    assert [cause.id for cause in choose([claim("x", None), claim("y", 0.99)], [FINDING])] == ["y"]


def test_a_claim_about_other_records_is_dropped() -> None:
    others = [claim("x", 1.0, "v"), claim("x", 1.0, step=2), claim("x", 1.0, phase="param")]

    assert choose(others, [FINDING]) == ()


def test_every_finding_gets_its_own_cause_in_causal_order() -> None:
    later = Finding(2, "param", "w", Kind.VALUE)

    found = choose([claim("late", 1.0, step=2, phase="param"), claim("early", 1.0)], [FINDING, later])

    assert [cause.id for cause in found] == ["early", "late"]


def test_settings_stay_and_come_last() -> None:
    setting = Cause("config.differs", "lr", step=0, phase="config", names=("lr",))

    assert [cause.id for cause in choose([setting, claim("x", 1.0)], [FINDING])] == ["x", "config.differs"]


def test_a_parameter_covers_its_state() -> None:
    assert covers(claim("x", 1.0, phase="opt_state"), Finding(1, "opt_state", "w/exp_avg", Kind.VALUE))
    assert not covers(claim("x", 1.0, phase="opt_state"), Finding(1, "opt_state", "v/exp_avg", Kind.VALUE))


def test_a_share_of_nothing_is_none() -> None:
    assert explained_share(0.0, 0.0) == 0.0
    assert explained_share(float("inf"), 1.0) == 0.0
    assert explained_share(float("nan"), 1.0) == 0.0
    assert Sums(4.0, 1.0).share == 0.75


def test_a_ratio_near_one_keeps_its_digits() -> None:
    import numpy as np

    a = np.random.default_rng(0).normal(size=10_000)
    fit = RatioFit()
    fit.add(a, a * (1 + 1e-9))

    assert fit.excess == pytest.approx(1e-9, rel=1e-5)
    assert fit.share == pytest.approx(1.0, abs=1e-6)
