"""Plan, rule, interval and table of a sweep, from made-up results: no run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenarios.sweep.plan import Asked, make_plan
from scenarios.sweep.rule import NoValue, Rule, parse_rule
from scenarios.sweep.table import make_table, percent, render
from scenarios.sweep.wilson import wilson
from scenarios.sweep.work import Result
from tests.builders import make_trace
from tests.scenarios.bisect.driven import trace
from tracer.errors import BadConfig, BadUsage

FIRST = {"step": 1, "phase": "clipped_grad", "name": "model.norm.weight"}


def test_the_interval_is_wilsons() -> None:
    # Worked by hand for z = 1.959964, k = 10, n = 15: centre 0.6326, half width 0.2156.
    assert wilson(10, 15) == pytest.approx((0.4171, 0.8482), abs=1e-4)
    assert wilson(0, 15) == pytest.approx((0.0, 0.2039), abs=1e-4)
    assert wilson(15, 15) == pytest.approx((0.7961, 1.0), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_rate_mirrors_and_narrows(counts: tuple[int, int]) -> None:
    passed, runs = counts
    low, high = wilson(passed, runs)
    assert 0 <= low <= passed / runs <= high <= 1
    mirrored = wilson(runs - passed, runs)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high))
    wider = wilson(passed, runs, 0.99)
    assert wider[0] <= low
    assert wider[1] >= high


def test_a_rate_is_never_rounded_to_all_or_nothing() -> None:
    assert [percent(0, 9), percent(1, 1000), percent(999, 1000), percent(9, 9), percent(0, 0)] == [
        "0 %",
        "1 %",
        "99 %",
        "100 %",
        "",
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("same", Rule()),
        ("loss<=2.5", Rule("loss", "<=", 2.5)),
        ("eval:says_unsloth >= 1", Rule("says_unsloth", ">=", 1.0)),
        ("loss > 1e-3", Rule("loss", ">", 1e-3)),
    ],
)
def test_rules_are_read(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize("text", ["", "equal", "loss", "loss<=x", "eval:<=1", "val:x<1"])
def test_other_rules_are_refused(text: str) -> None:
    with pytest.raises(BadUsage, match="cannot be read"):
        parse_rule(text)


def test_a_rule_reads_the_last_loss_and_the_last_value_that_was_logged(tmp_path: Path) -> None:
    file = make_trace(tmp_path / "run.h5", steps=3)
    losses = Rule("loss", "<=", 100.0)
    assert losses.passes(losses.value(file))
    assert not losses.passes(float("nan"))
    score = Rule("score", "<=", 100.0)
    assert score.passes(score.value(file))
    with pytest.raises(NoValue, match="recorded no greeting"):
        Rule("greeting").value(file)


def plan_of(tmp_path: Path, text: str, **asked: object) -> object:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    return make_plan(file, Asked(**asked))  # type: ignore[arg-type]


PLAN = """\
paths = ["mlx"]
seeds = [3, 5]
[set]
train.steps = 2
clip.mode = "value"
[baseline]
clip.mode = "none"
[grid]
clip.value = [0.1, 1]
lora.rank = [4, 8]
[[cells]]
clip.mode = "norm"
"""


def test_a_plan_is_all_combinations_then_the_list(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, PLAN)
    assert [plan.title(cell) for cell in range(5)] == [  # type: ignore[attr-defined]
        "clip.value = 0.1, lora.rank = 4",
        "clip.value = 0.1, lora.rank = 8",
        "clip.value = 1.0, lora.rank = 4",
        "clip.value = 1.0, lora.rank = 8",
        'clip.mode = "norm"',
    ]
    tasks = plan.tasks()  # type: ignore[attr-defined]
    assert [(task.seed, task.cell) for task in tasks[:6]] == [(3, 0), (3, 1), (3, 2), (3, 3), (3, 4), (5, 0)]
    assert {task.reference.settings["clip.mode"] for task in tasks} == {"none"}
    assert {task.run.settings["train.seed"] for task in tasks} == {3, 5}
    assert len({task.key("") for task in tasks}) == 10
    assert len({task.reference.key() for task in tasks}) == 2


def test_two_paths_are_compared_cell_by_cell_or_judged_each_by_itself(tmp_path: Path) -> None:
    text = "paths = ['torch', 'mlx']\nseeds = 2\n[grid]\nlora.rank = [4, 8]\n"
    compared = plan_of(tmp_path, text, share=True).tasks()  # type: ignore[attr-defined]
    assert [(t.run.path, t.reference.path, t.share) for t in compared] == [("mlx", "torch", True)] * 4
    assert all(t.run.settings == t.reference.settings for t in compared)
    judged = plan_of(tmp_path, text, rule="loss<=9").tasks()  # type: ignore[attr-defined]
    assert [(t.column, t.reference) for t in judged[:2]] == [("torch", None), ("mlx", None)]
    assert len(judged) == 8


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("seeds = 2\n", BadUsage, "0 paths"),
        ("paths = ['mlx']\nseeds = 0\n", BadUsage, "seeds = 0"),
        ("paths = ['mlx']\nseeds = [1, 1]\n", BadUsage, "means nothing"),
        ("paths = ['mlx']\nsedes = 2\n", BadConfig, "sedes is not known"),
        ("paths = ['mlx']\n[grid]\nlora.rank = 4\n", BadConfig, "has no list of values"),
        ("paths = ['mlx']\n[grid]\nlora.rank = [0]\n", BadConfig, "cell 1: lora.rank = 0 is not allowed"),
        ("paths = ['mlx']\n[grid]\ntrain.seed = [0]\n", BadUsage, "repeats a cell with"),
        ("paths = ['mlx']\nshare = true\n", BadUsage, "share needs two paths"),
        ("paths = ['mlx', 'torch']\n[baseline]\nlora.rank = 4\n", BadUsage, "a baseline is for one path"),
        ("paths = ['nowhere']\n", BadUsage, "no path called nowhere"),
        ("paths = [", BadConfig, "not a readable TOML"),
    ],
)
def test_a_plan_that_means_nothing_is_refused(text: str, error: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        plan_of(tmp_path, text)


def results(plan: object) -> list[Result]:
    """Cell 0 passes, cell 1 half of it, cell 2 fails, one run of cell 3 gave no answer."""
    passed = {0: (True, True), 1: (True, False), 2: (False, False), 3: (True, None), 4: (True, True)}
    return [
        Result(
            cell, seed, "", ok, first=None if ok else FIRST, cause="" if ok else "b clips", error="" if ok else "out"
        )
        for cell, oks in passed.items()
        for seed, ok in zip((3, 5), oks, strict=True)
    ]


def test_the_table_counts_and_does_not_depend_on_the_order_of_the_results(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, PLAN)
    made = results(plan)
    table = make_table(plan, made)  # type: ignore[arg-type]
    assert [(line.passed, line.judged, line.unanswered) for line in table.lines] == [
        (2, 2, 0),
        (1, 2, 0),
        (0, 2, 0),
        (1, 1, 1),
        (2, 2, 0),
    ]
    assert table.exit_code == 2
    assert table.lines[2].first == "step 1, clipped_grad, model.norm.weight"
    assert table.headline() == (
        'DIVERGED: 6 of 10 runs are the same as the baseline (clip.mode = "none"), 1 gave no answer'
    )
    lost = [result for result in made if result.cell == 2 or result.passed is None]
    assert make_table(plan, lost).headline().startswith("DIVERGED: 0 of 3 runs")  # type: ignore[arg-type]
    random.Random(1).shuffle(made)
    for form in ("text", "json", "markdown"):
        assert render(make_table(plan, made), form) == render(table, form)  # type: ignore[arg-type]
    assert json.loads(render(table, "json"))["lines"][1]["interval"] == list(wilson(1, 2))
    answered = [result for result in made if result.cell in (0, 4)]
    assert make_table(plan, answered).exit_code == 0  # type: ignore[arg-type]


def test_bad_options_are_one_line_and_2(tmp_path: Path) -> None:
    done = trace("sweep", tmp_path / "none.toml")
    assert (done.code, done.stdout) == (2, "")
    assert "does not exist" in done.stderr
    done = trace("sweep", "--path", "mlx", "--grid", "rank=4")
    assert "write section.key=value" in done.stderr
