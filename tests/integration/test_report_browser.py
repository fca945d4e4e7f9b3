"""report.html in Chromium: it loads alone and in silence, draws what it has, sorts, fits, and prints."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

from imatrix_runner.report.document import Report
from imatrix_runner.report.views.colours import palette
from imatrix_runner.report.views.page import render_html
from imatrix_runner.report.views.report_tables import level_table
from support import reports
from support.browser import Browser, browser

pytestmark = pytest.mark.browser

DENSE = replace(reports.sample_report(), domain=(reports.domain(), reports.domain("IQ2_M")))
MOE = reports.moe_report()
MIXED = reports.mixed_report()
HOSTILE = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    evil = replace(
        DENSE,
        model=replace(DENSE.model, name=HOSTILE),
        levels=tuple(replace(level, name=HOSTILE + level.name) for level in DENSE.levels),
        steps=(reports.ReportStep(HOSTILE, 1.0, HOSTILE, HOSTILE),),
    )
    made: dict[str, Report] = {"dense": DENSE, "moe": MOE, "mixed": MIXED, "bare": reports.bare_report(), "evil": evil}
    for name, report in made.items():
        (folder / f"{name}.html").write_text(render_html(report), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture
def dense(window: Browser, pages: dict[str, Path]) -> Browser:
    window.open(pages["dense"])
    return window


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["dense", "moe", "mixed", "bare", "evil"])
def test_loads_in_silence_and_asks_nobody_for_anything(window: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    window.open(pages[name], dark=dark)
    for radio in window.all("[name=heat]"):
        window.run("arguments[0].click()", radio)
        window.drawn()
    assert window.complaints() == []
    assert [address for address in window.requests() if not address.startswith("data:")] == [pages[name].as_uri()]
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.all(".failed") == []


def test_a_hostile_name_runs_nothing(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["evil"])
    assert window.run("return window.pwned") is None
    assert window.one("h1").text == HOSTILE
    assert window.all("img") == []


def test_a_script_that_is_not_the_pages_own_does_not_run(dense: Browser) -> None:
    dense.run("const s = document.createElement('script'); s.textContent = 'window.foreign = 1'; document.body.append(s);")
    assert dense.run("return window.foreign") is None
    assert any("Content Security Policy" in complaint for complaint in dense.complaints())


def marks(window: Browser, chart: str, name: str) -> int:
    """How many marks a chart's layer has; Vega names the group after the layer."""
    return int(
        window.run(
            "return document.querySelector(`[data-chart='${arguments[0]}'] .${arguments[1]}`)?.childElementCount ?? 0",
            chart,
            name,
        )
    )


def test_charts_have_as_many_marks_as_there_are_points(dense: Browser, window: Browser, pages: dict[str, Path]) -> None:
    assert DENSE.imatrix is not None
    assert marks(dense, "pareto", "points_marks") == len(DENSE.levels) + len(DENSE.comparisons)
    assert marks(dense, "pareto", "front_marks") == 1
    assert marks(dense, "pareto", "baselines_marks") == len(DENSE.comparisons)
    assert marks(dense, "saved", "bars_marks") == len(DENSE.comparisons)
    assert marks(dense, "heat-total", "cells_marks") == len(DENSE.imatrix.tensors)
    points = len(dense.all("[data-chart=curve] .mark-symbol.role-mark path"))
    assert points == 2 * len(DENSE.imatrix.curve)
    window.open(pages["moe"])
    assert marks(window, "coverage", "medians_marks") == 16
    assert marks(window, "coverage", "untouched_marks") == 1
    assert marks(window, "heat-total", "lacking_marks") == 1
    window.open(pages["mixed"])
    assert MIXED.costs is not None
    assert marks(window, "costs", "cells_marks") == sum(tensor.measured for tensor in MIXED.costs.tensors)
    assert marks(window, "costs", "lacking_marks") == len(reports.KINDS)


def test_charts_are_svg_with_a_description(dense: Browser) -> None:
    for plot in dense.all("[data-chart]:not([hidden] *)"):
        spec = json.loads(
            dense.run("return document.getElementById(arguments[0]).textContent", plot.get_attribute("data-chart"))
        )
        assert plot.get_attribute("aria-label") == spec["description"]
        assert plot.get_attribute("role") == "graphics-document"
        assert dense.run("return arguments[0].querySelectorAll('svg').length", plot) == 1


def test_names_of_levels_stand_in_the_plot_and_do_not_overlap(dense: Browser) -> None:
    found = "return [...document.querySelectorAll('[data-chart=pareto] .names_marks text')]"
    shown = ".filter((text) => getComputedStyle(text).opacity !== '0')"
    for width in (1200, 360):
        dense.size(width)
        dense.run("dispatchEvent(new Event('resize'))")
        boxes = dense.run(f"{found}{shown}.map((text) => [text.textContent, text.getBoundingClientRect().toJSON()])")
        names = {name for name, _ in boxes}
        assert {pick.level for pick in DENSE.picks} <= names
        for at, (name, one) in enumerate(boxes):
            assert one["right"] <= width
            for other_name, other in boxes[at + 1 :]:
                apart = one["right"] <= other["left"] or other["right"] <= one["left"]
                apart = apart or one["bottom"] <= other["top"] + 3 or other["bottom"] <= one["top"] + 3
                assert apart, (width, name, other_name)


def test_a_point_tells_its_figures_when_pointed_at(dense: Browser) -> None:
    point = dense.all("[data-chart=pareto] .points_marks path")[0]
    ActionChains(dense.driver).move_to_element(point).perform()
    tooltip = dense.one("#vg-tooltip-element")
    assert "Q8_0" in tooltip.text
    assert "0.000790 ± 0.000011" in tooltip.text
    assert dense.style("#vg-tooltip-element", "backgroundColor") == rgb(palette()["paper"])
    assert dense.complaints() == []


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"


def column(window: Browser, at: int) -> list[Any]:
    """A column's values, numbers where it has numbers."""
    values = window.run(
        "return [...document.querySelectorAll('table.sortable tbody tr')].map((row) => row.cells[arguments[0]].dataset.value)",
        at,
    )
    return [float(value) if value and at else value for value in values]


@pytest.mark.parametrize("by", ["click", "Enter"])
def test_every_column_sorts_both_ways(dense: Browser, by: str) -> None:
    columns = level_table(DENSE.levels).columns
    before = column(dense, 1)
    assert before == sorted(before, reverse=True)
    assert dense.one("th[aria-sort]").text.startswith("Size")
    for at, each in enumerate(columns):
        for _ in range(2):
            button = dense.all("table.sortable thead th button")[at]
            if by == "click":
                button.click()
            else:
                button.send_keys(Keys.ENTER)
            heading = dense.one(f"th[data-key={each.key}]")
            descending = heading.get_attribute("aria-sort") == "descending"
            assert len(dense.all("th[aria-sort]")) == 1
            values = column(dense, at)
            told = [value for value in values if value not in ("", None)]
            assert values[: len(told)] == told, "what is missing comes last"
            assert told == sorted(told, reverse=descending)
        if each.key != "size":
            assert descending != each.numeric, "numbers begin with the largest, texts with the first, and then turn round"
    assert dense.complaints() == []


def test_the_switch_shows_one_figure_at_a_time(dense: Browser) -> None:
    assert DENSE.imatrix is not None
    radios = dense.all("[name=heat]")
    radios[0].send_keys(Keys.ARROW_RIGHT)
    dense.drawn()
    assert [panel.is_displayed() for panel in dense.all("[data-panel]")] == [False, True, False]
    assert marks(dense, "heat-active", "cells_marks") == len(DENSE.imatrix.tensors)


def test_answers_of_one_level_at_a_time(dense: Browser) -> None:
    groups = dense.all("[data-group=answers]")
    assert [group.is_displayed() for group in groups] == [True, False]
    Select(dense.one("#level")).select_by_visible_text("IQ2_M")
    assert [group.is_displayed() for group in groups] == [False, True]
    details = dense.all("#answers-1 details")[0]
    details.find_element("css selector", "summary").send_keys(Keys.ENTER)
    assert details.get_attribute("open") is not None
    assert "underline" in dense.style("#answers-1 mark.removed", "textDecorationLine")


def test_a_command_is_copied(dense: Browser) -> None:
    dense.driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    dense.one(".command button").click()
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, (error) => done(String(error)))"
    assert dense.driver.execute_async_script(read) == DENSE.command
    assert dense.one("#status").get_attribute("textContent") == "Copied"


def test_the_keyboard_reaches_everything_and_shows_where_it_is(dense: Browser) -> None:
    active = "return document.activeElement"
    dense.one("body").send_keys(Keys.TAB)
    skip = dense.run(active)
    assert skip.get_attribute("class") == "skip"
    skip.send_keys(Keys.ENTER)
    assert dense.run("return document.activeElement.id") == "main"
    reached = []
    for _ in range(20):
        dense.run(active).send_keys(Keys.TAB)
        element = dense.run(active)
        reached.append(element.tag_name)
        outline = dense.run("const s = getComputedStyle(arguments[0]); return [s.outlineStyle, s.outlineWidth]", element)
        assert outline == ["solid", "3px"] or element.get_attribute("type") == "radio"
    assert "button" in reached
    assert "div" in reached, "a table that scrolls is reached, too"


def test_dark_and_light_follow_the_screen_at_once_and_charts_with_them(dense: Browser) -> None:
    for dark in (False, True, False):
        dense.media(dark=dark)
        colours = palette(dark=dark)
        assert dense.style("body", "backgroundColor") == rgb(colours["paper"])
        assert dense.style("h1", "color") == rgb(colours["ink"])
        assert dense.style("[data-chart=pareto] .role-axis-label text", "fill") == rgb(colours["soft"])
        assert dense.style("[data-chart=heat-total] .cells_marks path", "fill") in map(rgb, colours.values())


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", ["dense", "moe", "mixed", "bare", "evil"])
def test_nothing_is_wider_than_the_screen(window: Browser, pages: dict[str, Path], name: str, width: int) -> None:
    window.open(pages[name], width=width)
    assert window.run("return document.documentElement.scrollWidth") == width
    clipped = (
        "return [...document.querySelectorAll('.plot svg')].filter((svg) => !svg.closest('[hidden]') && "
        "[...svg.querySelectorAll('text')].some((text) => getComputedStyle(text).opacity !== '0' && text.textContent && "
        "text.getBoundingClientRect().right > svg.closest('.plot').getBoundingClientRect().right + 1)).length"
    )
    assert window.run(clipped) == 0


def test_on_a_phone_the_table_scrolls_and_keeps_its_first_column(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["dense"], width=360)
    box = ".scroll:has(table.levels)"
    assert window.run("const s = document.querySelector(arguments[0]); return s.scrollWidth > s.clientWidth", box)
    left = "return document.querySelector('table.levels tbody th').getBoundingClientRect().left"
    before = window.run(left)
    window.run("document.querySelector(arguments[0]).scrollLeft = 300", box)
    assert window.run(left) == before
    assert window.one(box).get_attribute("aria-label") == "All levels"


def test_on_paper_it_is_light_without_controls_and_opened_where_short(window: Browser, pages: dict[str, Path]) -> None:
    window.open(pages["dense"], dark=True)
    window.media(dark=True, paper=True)
    assert window.style("body", "backgroundColor") == rgb(palette()["paper"])
    assert window.style("[data-chart=pareto] .role-axis-label text", "fill") == rgb(palette()["soft"])
    for selector in ("nav", ".switch", ".choose", ".command button"):
        assert window.style(selector, "display") == "none"
    assert window.style(".scroll th", "position") == "static"
    window.media(dark=True)
    window.run("addEventListener('beforeprint', () => { window.seen = document.querySelectorAll('[open]').length; })")
    printed = window.driver.execute_cdp_cmd(
        "Page.printToPDF", {"preferCSSPageSize": True, "paperWidth": 8.27, "paperHeight": 11.69}
    )
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    assert window.run("return window.seen") == len(window.all("details[data-print]")) > 0
    assert window.all("details[open]") == []
    assert window.complaints() == []
