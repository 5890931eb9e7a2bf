"""Tolerances are what was measured, times a factor, rounded up, in the file that the diff reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from scenarios import calibrate
from scenarios.calibrate import Fit, Measured, Plan, Point, fit, rewrite, round_up
from tracer.errors import BadUsage

TEXT = """\
# About the file.

[exact]
hparams = 1e-6

[loss.float32]
base = 1
per_input = 1
bound = 1e-2

[grad.float32]
base = 1
per_input = 1
bound = 1e-2

[eval.float32]
base = 1
per_input = 1
bound = 1e-2
"""
HEADER = ["# Measured: by hand", "#   twice", "# (end of what was measured)"]
FIT = Fit(8e-6, 20.0, 2e-6, 5.0, 100)


@pytest.mark.parametrize(
    ("value", "rounded"), [(1.361e-5, 1.4e-5), (2e-5, 2e-5), (9.91, 10.0), (0.1, 0.1), (0.0, 0.0), (3.0000001, 3.1)]
)
def test_numbers_are_rounded_up_to_two_digits(value: float, rounded: float) -> None:
    assert round_up(value) == rounded


def test_base_and_slope_are_the_line_through_points_on_a_line() -> None:
    found = fit([Point(2e-6 + 5.0 * d, d) for d in (0.0, 1e-7, 1e-6, 1e-5)], safety=4.0, bound=1e-2)
    assert (found.base, found.per_input) == (8e-6, 20.0)
    assert found.measured_base == pytest.approx(2e-6)
    assert found.measured_slope == pytest.approx(5.0)


@pytest.mark.parametrize("seed", range(20))
def test_every_point_passes_with_the_factor_to_spare(seed: int) -> None:
    random = np.random.RandomState(seed)
    distances = np.where(random.rand(200) < 0.2, 0.0, 10.0 ** random.uniform(-9, -2, 200))
    points = [Point(10.0 ** random.uniform(-8, -5) + 3.0 * random.rand() * d, d) for d in distances]
    found = fit(points, safety=4.0, bound=1e-2)
    assert found.per_input is not None
    assert all(4.0 * p.observed <= (found.base + found.per_input * p.distance) * (1 + 1e-9) for p in points)


def test_noise_at_a_tiny_distance_goes_to_the_base_and_not_to_the_slope() -> None:
    points = [Point(0.088, 0.0), Point(0.13, 1e-7), *(Point(0.1, d) for d in (1e-5, 1e-4, 1e-3))]
    found = fit(points, safety=4.0, bound=1e-2)
    assert (found.base, found.per_input) == (0.52, 0.0)


def test_points_that_nobody_judges_are_left_out() -> None:
    found = fit([Point(1e-6, 0.0), Point(0.9, 1e-9), Point(1e-5, 1.0)], safety=4.0, bound=1e-2)
    assert (found.base, found.per_input) == (4e-6, 0.0)


def test_a_flat_fit_covers_every_point_by_its_base() -> None:
    found = fit([Point(1e-6, 0.0), Point(0.01, 1e-5)], safety=4.0, bound=1e-2, flat=True)
    assert (found.base, found.per_input) == (0.04, None)


def test_only_measured_tables_change_and_an_evaluation_is_a_loss() -> None:
    text = rewrite(TEXT, {("loss", "float32"): FIT}, HEADER)
    assert text.count("base = 8e-06  # measured 2.0e-06") == 2
    assert text.count("per_input = 20  # measured 5.0e+00") == 2
    grad = text[text.index("[grad.float32]") : text.index("[eval.float32]")]
    assert "base = 1\nper_input = 1\nbound = 1e-2" in grad
    assert text.count("bound = 1e-2") == 3
    assert "hparams = 1e-6" in text


def test_writing_twice_is_writing_once() -> None:
    once = rewrite(TEXT, {("loss", "float32"): FIT}, HEADER)
    assert rewrite(once, {("loss", "float32"): FIT}, HEADER) == once
    assert once.index("# Measured: by hand") < once.index("[exact]")


def test_pairs_that_were_measured_are_kept_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, file, runs = Plan(dtypes=("float32",), models=("tiny-llama",)), tmp_path / "points.json", []

    def measure(settings: Mapping[str, object], into: Measured) -> None:
        if len(runs) == 2:
            runs.append("interrupted")
            raise KeyboardInterrupt
        runs.append(str(settings["optimizer.lr"]))
        into.points["loss", "float32"].append(Point(1e-7, float(len(runs))))
        into.pairs += 1

    monkeypatch.setattr(calibrate, "measure_pair", measure)
    with pytest.raises(KeyboardInterrupt):
        calibrate._measure_or_load(plan, file)
    measured = calibrate._measure_or_load(plan, file)
    assert measured.pairs == len(plan.pairs()) == 4
    assert [point.distance for point in measured.points["loss", "float32"]] == [1.0, 2.0, 4.0, 5.0]
    with pytest.raises(BadUsage, match="measured with other options"):
        calibrate._measure_or_load(Plan(dtypes=("float16",)), file)
