"""The HTML report, as text: well formed, alone, escaped, honest about parts.  `tests/browser` looks at it in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from differ import DiffResult, Verdict
from differ.reporters import Style, reporter
from tests.differ.reporters.conftest import HOSTILE, Drawn, hostile, with_findings
from tracer.errors import BadUsage

pytest.importorskip("jinja2")

VOID = {"meta", "link", "input", "br", "hr", "img", "wbr"}
FAULTS = [None, "clip_value", "grad_nan", "init_names", "batch_order", "micro_batches", "steps_fewer", "unfinished"]


class Page(HTMLParser):
    """Parses strictly enough: every element closed in order, ids unique, texts and scripts collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids.update(value for key, value in attrs if key == "id" and value)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> outside of a drawing"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)

    def words(self) -> str:
        return " ".join("".join(self.text).split())


def render(result: DiffResult) -> str:
    return reporter("html")(result, Style())


@pytest.mark.parametrize("fault", FAULTS)
def test_the_page_is_well_formed(fault: str | None, drawn: Drawn) -> None:
    page = Page(render(drawn(fault)))

    assert max(page.ids.values()) == 1
    targets = {value for key, value in page.attributes if key in ("for", "aria-labelledby", "aria-describedby")}
    assert targets <= set(page.ids)
    assert page.tags["h1"] == page.tags["main"] == 1


def test_a_result_without_series_is_rendered_too(drawn: Drawn) -> None:
    page = Page(render(replace(drawn("clip_value"), series=None)))
    assert "DIVERGED at step 1, clipped_grad" in page.words()
    assert page.tags["figure"] == 0


def test_the_verdict_and_the_cause_come_first_in_the_words_of_the_terminal(drawn: Drawn) -> None:
    from differ.reporters import words

    result = drawn("clip_value")
    text = Page(render(result)).words()

    assert text.index("DIVERGED at step 1, clipped_grad") < text.index("Why") < text.index("Step by step")
    assert words.describe(result.findings[0]) in text
    assert words.before(result) in text
    assert words.counts(result) in text


@pytest.mark.parametrize(("fault", "word"), [(None, "SAME"), ("lr", "DIVERGED")])
def test_the_title_and_the_heading_hold_the_verdict(fault: str | None, word: str, drawn: Drawn) -> None:
    text = render(drawn(fault))
    assert f"<title>{word}: " in text
    assert f"<h1><strong>{word}</strong>" in text


def test_nothing_in_common_is_not_shown_as_agreement(drawn: Drawn) -> None:
    result = replace(drawn(None), verdict=Verdict.INCOMPARABLE)
    assert "<h1><strong>INCOMPARABLE</strong> nothing was compared" in render(result)


def test_the_page_needs_no_network(drawn: Drawn) -> None:
    text = render(drawn("clip_value"))

    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", ""))
    assert not {"src", "srcset", "action"} & {key for key, _ in Page(text).attributes}
    assert [value for key, value in Page(text).attributes if key == "href"] == ["data:,"]


def test_only_the_page_s_own_script_may_run(drawn: Drawn) -> None:
    page = Page(render(drawn("clip_value")))
    policy = next(value for key, value in page.attributes if key == "content" and value and "default-src" in value)

    data, script = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert json.loads(data)["steps"] == [1, 2, 3]


def test_hostile_text_stays_text(drawn: Drawn) -> None:
    clean, text = render(drawn("clip_value")), render(hostile(drawn("clip_value")))
    before, after = Page(clean), Page(text)

    assert after.tags["script"] == before.tags["script"] == 2
    assert after.tags["img"] == 0
    assert not any(key.startswith("on") for key, _ in after.attributes)
    assert "{{7*7}}" in "".join(after.text)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert HOSTILE.split("\n")[0] in "".join(after.text)
    assert "</script><script>" not in text


def test_data_for_the_script_can_neither_end_it_nor_begin_another() -> None:
    from differ.reporters.html import _island

    data = {"rows": ["</script x", "<!--<script", "&lt;", "\u2028", "]]>"]}
    assert not set("<>&\u2028") & set(_island(data))
    assert json.loads(_island(data)) == data


def test_without_data_the_page_is_small(drawn: Drawn) -> None:
    result = drawn("clip_value")
    assert len(render(replace(result, series=None, findings=(), first=result.first)).encode()) < 40_000


def test_a_part_says_of_how_many(drawn: Drawn) -> None:
    text = Page(render(with_findings(drawn("grad_element"), 3210))).words()
    assert "first 500 of 3,210 findings" in text
    assert text.count("lora_B.weight value") == 500

    assert "first 500" not in Page(render(with_findings(drawn("grad_element"), 500))).words()


def test_a_page_of_a_long_run_with_many_findings_stays_moderate(drawn: Drawn) -> None:
    assert len(render(with_findings(drawn("grad_element"), 100_000)).encode()) < 500_000


def test_steps_that_share_a_column_are_told(drawn: Drawn) -> None:
    result = drawn("grad_element")
    assert result.series is not None
    wide = replace(result.series, columns=((0, 0), (1, 3)), phases=replace(result.series.phases, cells=()), layers=())
    kept = tuple(replace(cell, column=min(cell.column, 1)) for cell in result.series.phases.cells)
    wide = replace(wide, phases=replace(result.series.phases, cells=kept))
    assert "3 steps in 2 columns" in Page(render(replace(result, series=wide))).words()


def test_one_step_a_constant_curve_and_values_that_are_no_numbers_are_drawn(drawn: Drawn) -> None:
    from differ.reporters.html.charts import draw
    from differ.series import Curve, Line

    nan, inf = float("nan"), float("inf")
    one = draw(Curve("loss", (Line("a", (2.0,)), Line("b", (2.0,)))), (7,))
    assert one.paths[0][1] == "M500 500h0"
    flat = draw(Curve("margin", (Line("m", (0.0, 0.0)),), logarithmic=True, limit=1.0), (1, 2))
    assert flat.paths[0][1] == "M0 1000h0L1000 1000"
    broken = draw(Curve("loss", (Line("a", (1.0, nan, 2.0, None, inf)),)), (1, 2, 3, 4, 5))
    assert broken.paths[0][1].count("M") == 2
    assert broken.odd.count("M") == 2


def test_the_error_without_jinja2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "differ.reporters.html", raising=False)

    with pytest.raises(BadUsage) as caught:
        reporter("html")

    assert "[html]" in caught.value.hint


def test_the_assets_are_in_the_package() -> None:
    folder = Path(sys.modules["differ.reporters"].__file__ or "").parent / "html"
    assert {"page.html.j2", "page.css", "page.js"} <= {path.name for path in folder.iterdir()}
