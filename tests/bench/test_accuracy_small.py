"""The accuracy benchmark on a few of its pairs: every fault at its exact address with its cause first, no false alarm."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from differ import Verdict, diff
from differ.causes import ids
from tests.bench.accuracy import coverage, rivals, smallest
from tests.bench.accuracy.__main__ import main
from tests.bench.accuracy.clean import all_clean
from tests.bench.accuracy.edits import rewrite
from tests.bench.accuracy.fault import SETTING, T
from tests.bench.accuracy.faults import all_faults
from tests.bench.accuracy.measure import Bench
from tests.scenarios.conftest import needs_mlx, needs_torch
from tracer.reader import open_trace

pytestmark = [needs_torch, needs_mlx]

FAULTS = (
    "grad.scale: one x1.02 at step 4, across",
    "grad.missing: one at step 2",
    "sign: one at step 2, mlx",
    "batch.mask: one label at step 4",
    "clip.norm: 0.1 or none, across",
    "optimizer.betas: beta2 0.95, not recorded",
    "optimizer.unheld: one",
    "optimizer.groups: one parameter in a second one",
    "corrupt.elements: one weight by 1e-4 at step 4, mlx",
    "corrupt.elements: one gradient in the file, step 2",
    "forward.scale: embedding x1.0005 at step 4, mlx",
    "forward.position: 1 further from 5 on in one layer at step 4",
)
CLEAN = ("rank 2, q and v: torch / mlx compiled", "rank 2, q and v: mlx eager / compiled")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    faults = [fault for fault in all_faults() if fault.id in FAULTS]
    clean = [pair for pair in all_clean() if pair.id in CLEAN]
    assert (len(faults), len(clean)) == (len(FAULTS), len(CLEAN))
    made = Bench(faults, clean, tmp_path_factory.mktemp("accuracy"), lambda _: None)
    made.store.record([arm for pair in (*faults, *clean) for arm in (pair.a, pair.b)])
    return made


def test_every_fault_is_found_at_its_exact_address_with_its_cause_first(bench: Bench) -> None:
    for name, said in bench.judge_faults().items():
        assert (said["verdict"], said["place"], said["exact"], said["right"]) == ("diverged", True, True, True), (
            name,
            said,
        )


def test_pairs_that_agree_are_the_same(bench: Bench) -> None:
    for name, said in bench.judge_clean(noise=False).items():
        assert said["verdict"] == "same", (name, said)
        assert said["margin"] < 1.0


def test_fixed_tolerances_call_the_clean_pair_of_two_frameworks_different(bench: Bench) -> None:
    found = bench.closeness()
    assert found[CLEAN[0]]["allclose"] is not None
    assert found[CLEAN[0]]["assert_close"] is not None


def test_every_tensor_has_a_name_of_its_own(bench: Bench) -> None:
    (fault,) = (fault for fault in bench.faults if fault.family == "forward.scale")
    with open_trace(bench.store.trace(fault.a)) as trace:
        names = [address for address, _ in rivals.tensors(trace)]
    assert len(set(names)) == len(names)
    assert {phase for _, phase, _ in names} >= {"forward", "loss", "grad"}


def test_an_answer_is_kept(bench: Bench) -> None:
    first = bench.judge_faults()
    began = (bench.folder / "faults.json").stat().st_size
    assert bench.judge_faults() == first
    assert (bench.folder / "faults.json").stat().st_size == began


def test_a_trace_rewritten_without_a_change_is_the_same_to_the_bit(bench: Bench, tmp_path: Path) -> None:
    source = bench.store.trace(T)
    result = diff(source, rewrite(source, tmp_path / "again.h5", lambda row: row))
    assert result.verdict is Verdict.SAME
    assert result.counts.same_bits == result.counts.compared


def test_the_best_threshold_weighs_faults_against_false_alarms() -> None:
    assert rivals.best_threshold([0.5, 0.4, 0.01], [0.02, 0.0]) == 0.02
    assert rivals.best_threshold([0.5], [0.6]) in (0.0, 0.5, 0.6)


def test_bisection_finds_the_smallest_size() -> None:
    assert smallest._bisect(lambda exponent: exponent >= -3.0) == pytest.approx(1e-3, rel=0.4)
    assert smallest._bisect(lambda _: False) is None


def test_what_is_in_the_table_is_said_beforehand() -> None:
    faults, clean = all_faults(), all_clean()
    assert len(faults) >= 60
    assert len(clean) >= 100
    assert len({fault.id for fault in faults}) == len(faults)
    assert len({pair.id for pair in clean}) == len(clean)
    assert {fault.a.path for fault in faults} >= {"torch", "mlx"}
    assert all(not fault.b.plan for fault in faults if fault.how == SETTING)


def test_every_registered_cause_is_planted_twice_early_and_late_in_one_and_in_all_or_there_is_a_reason() -> None:
    assert coverage.unexplained(all_faults()) == []


def test_a_cause_that_is_planted_nowhere_or_only_early_is_found() -> None:
    faults = all_faults()
    early = [fault for fault in faults if fault.family != "sign" or fault.step <= coverage.EARLY]
    assert coverage.unexplained(faults, ["no.such_cause"]) == ["no.such_cause: not planted"]
    assert coverage.unexplained(early) == ["sign: late", "sign: all"]


def test_reasons_are_given_for_what_is_not_planted_only() -> None:
    assert set(coverage.EXEMPT) <= set(ids())
    gaps = {cover.cause: set(cover.gaps) for cover in coverage.covers(all_faults())}
    assert [cause for cause, reasons in coverage.EXEMPT.items() if not set(reasons) <= gaps[cause]] == []


def test_a_name_that_no_pair_has_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--folder", str(tmp_path), "--only", "no such"])
    assert done.exit_code == 2
    assert "no pair is called no such" in done.output
