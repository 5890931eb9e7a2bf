"""Markdown, JUnit and annotations: the same words as on a terminal, escaped for where they go, never longer than allowed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from differ import DiffResult, Verdict
from differ.reporters import Style, github, junit, markdown, reporter
from differ.result import Cause
from tests.differ.reporters.conftest import HOSTILE, Drawn, hostile, with_findings

FAULTS = [None, "clip_value", "grad_nan", "init_names", "batch_order", "micro_batches", "steps_fewer", "unfinished"]


def render(name: str, result: DiffResult) -> str:
    return reporter(name)(result, Style())


# Markdown.


def test_markdown_begins_with_the_verdict_and_where(drawn: Drawn) -> None:
    lines = render("markdown", drawn("clip_value")).splitlines()
    assert lines[0].startswith("## ❌ DIVERGED at step 1, clipped_grad, `model.layers.")
    assert render("markdown", drawn(None)).startswith("## ✅ SAME\n")


@pytest.mark.parametrize("fault", FAULTS)
def test_markdown_tables_are_rectangular(fault: str | None, drawn: Drawn) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", render("markdown", drawn(fault)), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("number", [3_210, 100_000])
def test_markdown_stays_below_its_limit_and_counts_what_it_leaves_out(number: int, drawn: Drawn) -> None:
    text = render("markdown", with_findings(drawn("grad_element"), number))
    assert len(text.encode()) < 900_000
    assert f"first 200 of {number:,} findings" in text


def test_markdown_with_endless_names_stays_below_its_limit(drawn: Drawn) -> None:
    result = with_findings(drawn("grad_element"), 5_000)
    long = tuple(replace(f, name="`ü" * 5_000, detail="語|" * 5_000, nearest=("*" * 50_000,)) for f in result.findings)
    causes = tuple(Cause("x", "語" * 10_000, phase="grad") for _ in range(3_000))
    text = render("markdown", replace(result, first=long[0], findings=long, causes=causes))

    assert len(text.encode()) < 900_000
    assert re.search(r"first \d+ of 5,000 findings", text)
    assert "the first 50 of 3,000 are shown" in text


def test_markdown_takes_as_many_rows_as_fit(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "MOST_BYTES", 20_000)
    text = render("markdown", with_findings(drawn("grad_element"), 3_210))
    shown = re.search(r"first (\d+) of 3,210 findings", text)

    assert shown is not None
    assert 50 < int(shown[1]) == text.count("lora_B.weight` | value |") < 200
    assert 17_000 < len(text.encode()) < 20_000


def test_markdown_of_hostile_names_is_text(drawn: Drawn) -> None:
    text = render("markdown", hostile(drawn("clip_value")))
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)

    assert "\x1b" not in text
    assert "\u202e" not in text
    assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", outside)
    assert not re.search(r"(?<!\\)\[x", outside)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize("name", ["plain", "a`b", "``", "`", "a|b", "", " ", HOSTILE])
def test_a_name_as_code_cannot_end_its_fence(name: str) -> None:
    quoted = markdown.code(name)
    fence = re.match("`+", quoted)
    assert fence is not None
    inside = quoted[len(fence[0]) : -len(fence[0])]
    assert fence[0] not in re.findall("`+", inside)
    assert "\n" not in quoted


# JUnit.


def suite(result: DiffResult) -> ET.Element:
    found = ET.fromstring(render("junit", result)).find("testsuite")
    assert found is not None
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_junit_counts_its_cases(fault: str | None, drawn: Drawn) -> None:
    root = suite(drawn(fault))
    cases = root.findall("testcase")

    assert root.get("tests") == str(len(cases)) != "0"
    for attribute, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert root.get(attribute) == str(len(root.findall(f"testcase/{tag}")))
    assert (root.get("failures") == "0") == (drawn(fault).verdict is Verdict.SAME)


def test_junit_fails_the_phase_that_diverged_and_no_other(drawn: Drawn) -> None:
    root = suite(drawn("clip_value"))
    failed = [case.get("name") for case in root.findall("testcase") if case.find("failure") is not None]
    assert failed == ["clipped_grad"]
    message = root.find("testcase/failure")
    assert message is not None
    assert (message.get("message") or "").startswith("step 1, clipped_grad, model.layers.")


def test_junit_does_not_pass_a_phase_of_which_nothing_was_judged(drawn: Drawn) -> None:
    cases = {case.get("name"): case for case in suite(drawn("batch_order")).findall("testcase")}
    skipped = cases["loss"].find("skipped")
    assert skipped is not None
    assert "because their inputs do" in (skipped.get("message") or "")


def test_junit_of_nothing_in_common_is_an_error(drawn: Drawn) -> None:
    root = suite(replace(drawn(None), verdict=Verdict.INCOMPARABLE, series=None))
    assert root.get("errors") == "1"


def test_junit_of_hostile_names_is_xml(drawn: Drawn) -> None:
    root = suite(hostile(drawn("clip_value")))
    failure = root.find("testcase/failure")
    assert failure is not None
    assert "<script>alert(1)</script>" in (failure.text or "")


def test_junit_lists_a_part_and_says_so(drawn: Drawn) -> None:
    failure = suite(with_findings(drawn("grad_element"), 3_210)).find("testcase/failure")
    assert failure is not None
    assert "the first 100 of 3,210 findings are shown" in (failure.text or "")


# GitHub.


def test_annotations_begin_with_the_first_divergence(drawn: Drawn) -> None:
    lines = github.workflow_commands(drawn("clip_value"))
    assert lines[0].startswith("::error title=DIVERGED at step 1%2C clipped_grad%2C model.layers.")
    assert github.workflow_commands(drawn(None))[0].startswith("::notice title=SAME::3 steps")


def test_there_are_at_most_ten_annotations_and_the_last_counts_the_rest(drawn: Drawn) -> None:
    lines = github.workflow_commands(with_findings(drawn("grad_element"), 3_210))
    assert len(lines) == 10
    # 81 steps: one error, 39 more of the first, one line for each of the others.
    assert lines[-1] == "::warning title=More divergences::73 more are in the report"


def test_annotations_of_hostile_names_are_one_command_a_line(drawn: Drawn) -> None:
    text = render("github", hostile(drawn("clip_value")))

    for line in text.splitlines():
        assert re.fullmatch(r"::(error|warning|notice) title=[^:,\r\n]*::.*", line)
        assert not re.search(r"%(?!25|0A|0D|2C|3A)", line)
        assert "\x1b" not in line
    assert text.count("\n::") == text.count("\n") - 1


def test_percent_line_breaks_colons_and_commas_are_escaped() -> None:
    assert github.command("error", "a:b,c%\n", "1: 5 %,\n2") == "::error title=a%3Ab%2Cc%25 ::1: 5 %25,%0A2"


def test_summary_and_outputs_go_where_the_runner_says(drawn: Drawn, tmp_path: Path) -> None:
    summary, output = tmp_path / "summary", tmp_path / "output"
    summary.write_text("before\n")
    github.publish(drawn("clip_value"), {github.SUMMARY: str(summary), github.OUTPUT: str(output)})

    assert summary.read_text().startswith("before\n## ❌ DIVERGED")
    assert outputs(output.read_text())["verdict"] == "diverged"
    assert outputs(output.read_text())["first"].startswith("step 1, clipped_grad, model.layers.")


def test_a_hostile_name_sets_no_other_output(drawn: Drawn, tmp_path: Path) -> None:
    output = tmp_path / "output"
    github.publish(hostile(drawn("clip_value")), {github.OUTPUT: str(output)})
    assert set(outputs(output.read_text())) == {"verdict", "first"}


def test_outside_of_a_runner_nothing_is_written(drawn: Drawn) -> None:
    github.publish(drawn(None), {})


def outputs(text: str) -> dict[str, str]:
    """Parse as the runner does: NAME<<END, lines, END."""
    lines = iter(text.splitlines())
    found = {}
    for line in lines:
        name, _, end = line.partition("<<")
        value = []
        for line in lines:
            if line == end:
                break
            value.append(line)
        found[name] = "\n".join(value)
    return found


def test_the_reporters_that_draw_say_so() -> None:
    assert all(module.SERIES for module in (junit, markdown, github))


@pytest.mark.parametrize("name", ["text", "markdown", "github", "junit", "html"])
def test_a_cause_of_a_later_finding_says_where_it_belongs(name: str, drawn: Drawn) -> None:
    result = drawn("clip_value")
    assert result.first is not None
    later = replace(result.first, step=3)
    here, there = (
        Cause("x", words, step=step, phase=later.phase, explains=1.0) for words, step in (("near", 1), ("far", 3))
    )
    both = replace(result, findings=(result.first, later), causes=(here, there))
    alone = replace(result, causes=(here,))

    for shown in (both, alone):
        text = reporter(name)(shown, Style(width=200))
        assert "near" in text
        assert f"{later.phase}: near" not in text
        assert (f"step 3, {later.phase}: far" in text.replace("\\_", "_")) is (shown is both)
