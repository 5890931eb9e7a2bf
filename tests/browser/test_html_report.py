"""The HTML report in a browser: sorts, filters, works from the keyboard, fits a phone, prints, runs no script of a name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from differ import DiffResult
from differ.reporters import Style, reporter
from tests.browser.conftest import Open
from tests.differ.reporters.conftest import Drawn, drawn, hostile, with_findings

__all__ = ["drawn"]

pytestmark = pytest.mark.browser

WIDTHS = [320, 360, 768, 1200]


def html(result: DiffResult) -> str:
    return reporter("html")(result, Style())


def shown(page: Any, table: str, column: int) -> list[str]:
    cells = page.locator(f"#{table} tbody tr:not([hidden]) > :nth-child({column})")
    return [text.strip() for text in cells.all_inner_texts()]


def press(page: Any, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def test_it_opens_without_a_complaint_and_without_network(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value"))).page
    assert page.title().startswith("DIVERGED")
    assert page.locator("h1").inner_text() == "DIVERGED at step 1, clipped_grad"


def test_columns_sort_by_number_and_back_from_the_keyboard(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(with_findings(drawn("grad_element"), 120))).page
    head = page.locator('#findings th[data-key="error"]')
    head.locator("button").focus()

    press(page, "Enter")
    numbers = [float(text) for text in shown(page, "findings", 5)]
    assert head.get_attribute("aria-sort") == "descending"
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] == pytest.approx(119 / 7, rel=1e-2)

    press(page, "Space")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in shown(page, "findings", 5)] == numbers[::-1]
    assert page.locator('#findings th[aria-sort="ascending"]').count() == 1


def test_phases_sort_in_causal_order_not_by_the_alphabet(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value"))).page
    page.locator('#records th[data-key="phase"] button').click()
    order = list(dict.fromkeys(shown(page, "records", 1)))
    assert order == [name for name in ("loss", "grad", "clipped_grad", "opt_state", "param", "eval") if name in order]
    assert len(order) > 3


def test_cells_without_a_number_stay_last(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value"))).page
    button = page.locator('#records th[data-key="found"] button')
    for _ in range(2):
        button.click()
        assert shown(page, "records", 8)[0] == "step 1"


def test_the_filter_narrows_counts_and_is_cleared(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(with_findings(drawn("grad_element"), 3_210))).page
    status = page.locator("#findings-count")
    assert status.inner_text() == "first 500 of 3,210 findings"

    press(page, "/")
    page.keyboard.type("layers.7.mlp step=3")
    assert shown(page, "findings", 1) == ["3"]
    assert status.inner_text() == "1 match, of the first 500 of 3,210 findings"

    page.keyboard.type("x")
    assert shown(page, "findings", 1) == []
    press(page, "Escape")
    assert len(shown(page, "findings", 1)) == 500
    assert status.inner_text() == "first 500 of 3,210 findings"


def test_everything_that_can_be_used_is_reached_by_tab_and_shows_it(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value"))).page
    reached = []
    for _ in range(60):
        press(page, "Tab")
        focus = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            " const name = e.dataset.strip || e.dataset.curve || e.id || e.textContent.trim();"
            " return [e.tagName, name, s.outlineStyle, s.outlineWidth]; })()"
        )
        if focus[0] == "BODY":
            break
        reached.append((focus[0], focus[1]))
        assert focus[2] != "none", focus
        assert float(focus[3].removesuffix("px")) >= 2

    names = [name for _, name in reached]
    assert names[0] == "theme"
    assert {"phases", "clipped_grad", "loss", "grad_norm", "gap", "margin", "findings-filter", "records-filter"} <= set(
        names
    )
    assert ("BUTTON", "Relative error") in reached


def test_a_strip_is_read_with_the_arrow_keys_and_filters_the_findings(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value"))).page
    strip, readout = page.locator('[data-strip="phases"]'), page.locator('.readout[data-for="phases"]')
    page.locator("#theme").focus()
    press(page, "Tab")
    assert strip.evaluate("e => e === document.activeElement")
    assert readout.inner_text().startswith("step 0, init: 15 same bits")

    press(page, "ArrowRight", *["ArrowDown"] * 5)
    assert readout.inner_text().startswith("step 1, clipped_grad: 1 diverged")
    press(page, "End")
    assert readout.inner_text().startswith("step 3, clipped_grad: 6 propagated")
    press(page, "Home", "ArrowRight", "Enter")
    assert page.locator("#findings-filter").input_value() == "step=1 phase=clipped_grad"
    assert len(shown(page, "findings", 1)) == 1


def test_a_strip_and_a_curve_are_read_with_the_pointer(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value"))).page
    box = page.locator('[data-strip="phases"]').bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 5.5 / 9)
    assert page.locator('.readout[data-for="phases"]').inner_text().startswith("step 1, clipped_grad")

    curve = page.locator('[data-curve="loss"]')
    curve.scroll_into_view_if_needed()
    box = curve.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20)
    assert re.fullmatch(r"step 3: a 12\.0\d+, b 12\.0\d+", page.locator('.readout[data-for="loss"]').inner_text())


def test_one_strip_of_layers_is_shown_at_a_time(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value"))).page
    visible = page.locator("[data-layer]:visible")
    assert visible.get_attribute("data-layer") == "clipped_grad"

    page.locator('[data-choose="param"]').click()

    assert visible.get_attribute("data-layer") == "param"
    assert page.locator('[data-choose][aria-pressed="true"]').inner_text() == "param"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme: str, open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value")), color_scheme=scheme).page
    for selector in ["h1", ".where", "dt", ".why_p", ".part", ".legend", ".ticks", "td", ".choice_button", "footer_p"]:
        assert page.evaluate(CONTRAST, selector.replace("_", " ")) >= 4.5, selector


# Contrast of an element's text by WCAG 2, against the first ground behind it that is not transparent.
CONTRAST = """selector => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const linear = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => { const [x, y, z] = [r, g, b].map(linear);
    return .2126 * x + .7152 * y + .0722 * z; };
  const element = document.querySelector(selector); let ground = element;
  while (ground && rgb(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const [a, b] = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(c => light(rgb(c)));
  return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
}"""


def test_the_theme_follows_the_system_and_can_be_chosen(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value")), color_scheme="dark").page
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    button = page.locator("#theme")

    button.click()
    assert button.inner_text() == "Theme: light"
    assert page.evaluate(ground) == "rgb(255, 255, 255)" != dark
    page.reload()
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    button.click()
    assert (button.inner_text(), page.evaluate(ground)) == ("Theme: dark", dark)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("fault", [None, "clip_value", "init_names"])
def test_nothing_but_a_table_is_wider_than_the_window(
    width: int, fault: str | None, open_page: Open, drawn: Drawn
) -> None:
    page = open_page(html(drawn(fault)), width=width).page
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_prints_complete_dark_on_light_and_without_controls(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn("clip_value")), color_scheme="dark").page
    page.emulate_media(media="print")

    assert page.locator(".tools:visible, .bar input:visible, .choice:visible").count() == 0
    assert page.locator("[data-layer]:visible").count() == 4
    assert page.evaluate(CONTRAST, "h1") >= 4.5
    assert page.evaluate("getComputedStyle(document.querySelector('.scroll')).overflowY") == "visible"
    page.emulate_media(media=None)
    assert page.pdf(format="A4")[:5] == b"%PDF-"


def test_it_reads_without_scripts(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(with_findings(drawn("grad_element"), 700)), java_script_enabled=False).page
    assert page.locator("#findings tbody tr").count() == 500
    assert page.locator("#theme:visible, .bar input:visible, .choice:visible").count() == 0
    assert page.locator("[data-layer]:visible").count() == 4


def test_no_name_becomes_a_script_or_an_element(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(hostile(drawn("clip_value"))), width=360).page
    assert page.locator("img").count() == 0
    assert "<script>alert(1)</script>" in page.locator(".where").inner_text()
    page.locator("#theme").focus()
    press(page, "Tab", "Tab", "ArrowDown")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_long_run_stays_usable(open_page: Open, drawn: Drawn) -> None:
    page = open_page(html(drawn(None, steps=300, layers=(0,), depth=1, micro_batches=1))).page
    page.locator('[data-strip="phases"]').focus()
    press(page, "End")
    assert page.locator("h1").inner_text().startswith("SAME 300 steps")
    assert "300 steps in" in page.locator("main").inner_text()
