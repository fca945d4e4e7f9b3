"""report.html as text: what stands in it, what is left out, and what a hostile name cannot do. A browser looks at it in
``integration/test_report_browser.py``."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from imatrix_runner import safe_text
from imatrix_runner.engines.measures import Estimate
from imatrix_runner.evaluate.answer_agreement import differences, words
from imatrix_runner.evaluate.recommendations import Pick
from imatrix_runner.report.document import Report, ReportFile, ReportStep, WithoutBaseline
from imatrix_runner.report.views import page as page_module
from imatrix_runner.report.views import wording
from imatrix_runner.report.views.card import render_card
from imatrix_runner.report.views.page import ANSWERS, embedded_json, render_html
from imatrix_runner.report.views.report_tables import level_table
from support import reports

DENSE, MOE, BARE = reports.sample_report(), reports.moe_report(), reports.bare_report()
MIXED = reports.mixed_report()
HOSTILE = '"></script></style><img src=x onerror=alert(1)>{{ 7*7 }}&\x1b[31m\u2028\u202e'
_VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})


class Page(HTMLParser):
    """The elements of a page, each with its attributes; texts of visible elements; whether every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.data: dict[str, str] = {}
        self.styles: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        if where == "style":
            self.styles.append(data)
        elif where != "script":
            self.texts.append(data)
        elif self.elements[-1][1].get("type") == "application/json":
            self.data[self.elements[-1][1]["id"]] = data
        else:
            self.scripts.append(data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture(scope="module")
def dense() -> Page:
    return Page(render_html(DENSE))


@pytest.fixture(scope="module")
def moe() -> Page:
    return Page(render_html(MOE))


@pytest.fixture(scope="module")
def bare() -> Page:
    return Page(render_html(BARE))


@pytest.fixture(scope="module")
def evil() -> Page:
    """Every text that comes from files is hostile."""
    return Page(render_html(poisoned(DENSE)))


def poisoned(report: Report) -> Report:
    assert report.imatrix is not None
    assert report.evaluation is not None
    assert report.imatrix.calibration is not None
    text = replace(
        report.imatrix.calibration,
        name=HOSTILE,
        template=HOSTILE,
        sources=(reports.CalibrationSource(HOSTILE, HOSTILE, HOSTILE, 0.5),),
    )
    return replace(
        report,
        model=replace(
            report.model,
            name=HOSTILE,
            architecture=HOSTILE,
            type=HOSTILE,
            origin=HOSTILE,
            repo=HOSTILE,
            license=HOSTILE,
            files=(ReportFile(HOSTILE, 1, HOSTILE),),
        ),
        levels=tuple(
            replace(level, name=HOSTILE + level.name, files=(ReportFile(HOSTILE, 1, HOSTILE),)) for level in report.levels
        ),
        comparisons=tuple(replace(each, level=HOSTILE + each.level) for each in report.comparisons),
        domain=tuple(
            replace(
                each,
                level=HOSTILE,
                pairs=tuple(replace(p, prompt=HOSTILE, source=HOSTILE, level=HOSTILE + "x") for p in each.pairs),
            )
            for each in report.domain
        ),
        picks=tuple(Pick(pick.why, HOSTILE + pick.level, HOSTILE) for pick in report.picks),
        imatrix=replace(
            report.imatrix,
            tensors=tuple(replace(tensor, kind=HOSTILE) for tensor in report.imatrix.tensors),
            without_data=(HOSTILE,),
            datasets=(HOSTILE,),
            stopped=HOSTILE,
            engine=HOSTILE,
            calibration=text,
        ),
        evaluation=replace(report.evaluation, text=HOSTILE, engine=HOSTILE, reference=HOSTILE),
        steps=(ReportStep(HOSTILE, 1.0, HOSTILE, HOSTILE),),
        command=HOSTILE,
        toolchain=HOSTILE,
        program=HOSTILE,
        made=HOSTILE,
    )


def test_the_page_and_the_card_say_what_the_figures_are_of_and_show_the_same_tensors_once() -> None:
    report = DENSE
    first, second, *rest = report.levels
    report = replace(
        report,
        model=replace(report.model, quantised="Q8_0"),
        levels=(replace(first, others=(second.name,)), replace(second, same_as=first.name), *rest),
        caveats=("The source is quantised Q8_0: every figure is a distance from that.",),
        without_twin=(WithoutBaseline("IQ2_M", "cannot be made without an imatrix"),),
    )
    for text in (render_html(report), render_card(report).replace("\\", "")):
        assert "quantised Q8_0" in text
        assert "every figure is a distance from that." in text
        assert "cannot be made without an imatrix" in text
        assert f"{first.name} (= {second.name})" in text


def test_the_answer_comes_first_with_its_rule(dense: Page) -> None:
    pick = DENSE.picks[0]
    level = next(each for each in DENSE.levels if each.name == pick.level)
    assert level.measured is not None
    assert f"Take {pick.level} : 5.31 GiB, KLD {wording.kld(level.measured.kld.value)}" in dense.text
    assert dense.text.index("Take ") < dense.text.index("Size and quality", dense.text.index("Take "))
    for each in DENSE.picks:
        assert each.rule in dense.text


def test_what_was_asked_for_is_the_answer_where_somebody_asked() -> None:
    page = Page(render_html(replace(DENSE, picks=(*DENSE.picks, Pick("target", "Q4_K_L", "the closest with at most 5 GiB")))))
    assert "Take Q4_K_L :" in page.text


def test_every_level_is_a_row_with_values_to_sort_by(dense: Page) -> None:
    rows = [each for each in dense.named("th") if each.get("scope") == "row" and each.get("data-value") in reports.LEVELS]
    assert [row["data-value"] for row in rows] == list(reports.LEVELS)
    table = level_table(DENSE.levels)
    assert [column.key for column in table.columns] == [
        *("level", "size", "bits", "kld", "kld99", "ppl", "ratio", "same", "dp", "fallbacks", "time")
    ]
    cells = dict(zip((column.key for column in table.columns), table.rows[4][1], strict=True))
    assert (cells["kld"].text, float(cells["kld"].value)) == ("0.0181 ± 0.0002", 0.0181)
    assert (cells["size"].text, float(cells["size"].value)) == ("4.57 GiB", DENSE.levels[4].n_bytes)
    assert (cells["fallbacks"].text, cells["fallbacks"].value) == ("–", "")


def test_columns_without_anything_are_left_out(bare: Page) -> None:
    assert [column.key for column in level_table(BARE.levels).columns] == ["level", "size", "bits", "time"]
    assert "KLD" not in bare.text


def test_sections_without_data_are_left_out(bare: Page, moe: Page, dense: Page) -> None:
    def headings(page: Page) -> list[str]:
        return [each["id"] for each in page.named("h2") if "id" in each]

    assert headings(bare) == ["levels", "origin"]
    assert headings(moe) == ["sizes", "levels", "imatrix", "origin"]
    assert headings(dense) == ["sizes", "levels", "worth", "imatrix", "answers", "origin"]
    for page in (bare, moe, dense):
        linked = [each["href"][1:] for each in page.named("a") if each["href"].startswith("#")]
        assert linked == ["main", *headings(page)]
    assert "2 levels, from 641.25 MiB to 1.09 GiB; none is measured." in bare.text


def test_mixes_are_told_with_what_they_were_compared_with() -> None:
    page = Page(render_html(MIXED))
    headings = [each["id"] for each in page.named("h2") if "id" in each]
    assert headings == ["sizes", "levels", "mixes", "worth", "imatrix", "answers", "origin"]
    assert "costs" in page.data
    for text in (
        "MIX@like:Q4_K_M, MIX@4.5GiB",
        "0.61 ± 0.03 of Q4_K_M, 0.65 in the typical chunk",
        "0.62 ± 0.02 of Q4_K_M, 0.66 in the typical chunk",
        "0.98 ± 0.03 of stock between Q3_K_M and IQ4_XS",
        "120 Q4_K, 81 IQ4_XS, 25 Q6_K; 1 without imatrix",
        "MIX@like:Q8_0 : stock Q8_0 was kept, because no mix was surely better",
    ):
        assert text in page.text
    for level in MIXED.levels:
        for file in level.mix.files if level.mix is not None else ():
            assert f"{file.name}, " in page.text
            assert file.sha256 in page.text


def test_costs_without_a_mix_and_a_mix_without_costs_are_shown() -> None:
    alone = Page(render_html(replace(DENSE, costs=reports.costs())))
    assert "mixes" in [each.get("id") for each in alone.named("h2")]
    assert "Asked for" not in alone.text
    without = Page(render_html(replace(MIXED, costs=None, evaluation=None)))
    assert "costs" not in without.data
    assert "0.61 ± 0.03 of Q4_K_M" in without.text


def test_the_table_of_levels_says_what_a_mix_gained() -> None:
    table = level_table(MIXED.levels)
    keys = [column.key for column in table.columns]
    cells = {level.name: cells[keys.index("stock")] for level, cells in table.rows}
    assert (cells[reports.WON].text, cells[reports.WON].value) == ("0.61 ± 0.03 of Q4_K_M", "0.61")
    assert (cells["Q4_K_M"].text, cells["Q4_K_M"].value) == ("–", "")


def test_a_report_without_levels_is_a_page_too() -> None:
    page = Page(render_html(replace(BARE, levels=())))
    assert [each.get("id") for each in page.named("h2")] == ["origin"]


def test_charts_have_their_data_their_words_and_a_table(dense: Page, moe: Page) -> None:
    drawn = {each["data-chart"] for each in dense.named("div") if "data-chart" in each}
    assert drawn == set(dense.data) == {"pareto", "saved", "heat-total", "heat-active", "heat-entropy", "curve"}
    assert "coverage" in moe.data
    for page in (dense, moe):
        for text in page.data.values():
            spec = json.loads(text)
            assert " ".join(spec["description"].split()) in page.text
    assert "blk.15.ffn_gate_exps.weight" in moe.text


def test_the_page_is_one_file_that_allows_itself_alone(dense: Page) -> None:
    policy = next(each["content"] for each in dense.named("meta") if each.get("http-equiv") == "Content-Security-Policy")
    directives = dict(each.split(" ", 1) for each in policy.split("; "))
    assert {name: value for name, value in directives.items() if name not in ("script-src", "style-src")} == {
        "default-src": "'none'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for kind, texts in (("script-src", dense.scripts), ("style-src", dense.styles)):
        assert directives[kind].split() == [f"'sha256-{hashed(text)}'" for text in texts]
    for tag, attributes in dense.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert "src" not in attributes
        if tag == "link":
            assert attributes["href"] == "data:,"


def hashed(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_the_page_is_well_formed_and_has_landmarks(dense: Page, moe: Page, bare: Page, evil: Page) -> None:
    for page in (dense, moe, bare, evil):
        assert page.open == []
        tags = [tag for tag, _ in page.elements]
        assert [tags.count(tag) for tag in ("h1", "main", "header", "footer", "nav")] == [1] * 5
        assert page.named("html") == [{"lang": "en"}]
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        for _, attributes in page.elements:
            assert attributes.get("aria-labelledby", ids[0]) in ids


def test_a_hostile_name_is_a_text_and_nothing_else(evil: Page, dense: Page) -> None:
    assert evil.named("img") == []
    assert len(evil.named("script")) == len(dense.named("script"))
    assert safe_text.shown(HOSTILE) in "".join(evil.texts)
    attributes = [value for _, each in evil.elements for value in each.values()]
    everything = " ".join([*evil.texts, *evil.data.values(), *attributes])
    assert not any(character in everything for character in "\x1b\u202e")
    assert not any(each["href"].startswith("http") for each in evil.named("a"))
    assert "<" not in "".join(evil.data.values())


def test_only_a_repository_becomes_a_link(dense: Page) -> None:
    assert [each["href"] for each in dense.named("a") if "#" not in each["href"]] == [
        "https://huggingface.co/example-org/Ministral-8B"
    ]
    for repo in ("javascript:alert(1)", "a/b/c", "../x", "a/b?x=1", "a/b\n"):
        page = Page(render_html(replace(BARE, model=replace(BARE.model, repo=repo))))
        assert not any("huggingface" in each["href"] for each in page.named("a"))


def test_json_cannot_leave_its_element() -> None:
    value = {"a": "</script><!--\u2028\u2029&"}
    text = embedded_json(value)
    assert not any(character in text for character in "<>&\u2028\u2029")
    assert json.loads(text) == value


def test_answers_stand_side_by_side_with_the_differing_words_marked(dense: Page) -> None:
    assert [each["class"] for each in dense.named("mark")].count("removed") == 4
    assert "differs after 8 tokens" in dense.text
    assert "the same, 6 tokens" in dense.text


def test_a_level_of_several_is_chosen_and_all_are_there() -> None:
    page = Page(render_html(replace(DENSE, domain=(reports.domain(), reports.domain("IQ2_M")))))
    groups = [each["id"] for each in page.named("div") if each.get("data-group") == "answers"]
    assert [each["value"] for each in page.named("option")] == groups
    assert len(groups) == 2


def test_the_title_of_a_prompt_of_several_lines_is_one_line() -> None:
    domain = reports.domain()
    pair = replace(domain.pairs[0], prompt="Sum up:\n\n\tone\r\ntwo")
    page = Page(render_html(replace(DENSE, domain=(replace(domain, pairs=(pair,), n_prompts=1),))))
    assert "Sum up: one two" in page.text
    assert "\ufffd" not in page.text


def test_many_prompts_are_bounded_and_the_rest_is_counted() -> None:
    domain = reports.domain()
    many = replace(domain, pairs=domain.pairs[:1] * (ANSWERS + 5), n_prompts=ANSWERS + 5)
    page = Page(render_html(replace(DENSE, domain=(many,))))
    assert len([each for each in page.named("details") if each.get("class") == "prompt"]) == ANSWERS
    assert "5 more prompts in report.json" in page.text


def test_provenance_names_hashes_licences_and_every_command(dense: Page) -> None:
    for text in (
        reports.hashed("source"),
        reports.hashed("imatrix"),
        reports.hashed("calibration"),
        reports.hashed("manifest"),
        reports.hashed("held_out.txt"),
        reports.hashed("logits"),
        "CC-BY-SA-4.0",
        "apache-2.0",
        "100 of 512 tokens; 25,600 tokens scored",
        *(step.command for step in DENSE.steps),
        *(file.sha256 for level in DENSE.levels for file in level.files),
    ):
        assert text in dense.text


def test_the_same_report_gives_the_same_page() -> None:
    assert render_html(MOE) == render_html(MOE)


@pytest.mark.parametrize(
    ("source", "level", "removed", "added"),
    [
        ("the cat sat", "the cat sat", [], []),
        ("the cat sat down", "the dog sat down", ["cat"], ["dog"]),
        ("it gives off gas", "it releases gas", ["gives off"], ["releases"]),
        ("yes", "", ["yes"], []),
        ("one two", "one two three", [], ["three"]),
        ("猫は座った", "犬は座った", ["猫"], ["犬"]),
        ("고양이가 앉았다", "고양이는 앉았다", ["고양이가"], ["고양이는"]),  # Korean has spaces between words
        ("แมวนั่ง", "หมานั่ง", ["แ", "ว"], ["ห", "า"]),
        ("ແມວ", "ໝາວ", ["ແມ"], ["ໝາ"]),
        ("ឆ្មា", "ឆ្កា", ["ម"], ["ក"]),
        ("ကြောင်", "ကြောက်", ["င"], ["က"]),
        ("ཞི་མི", "ཞི་ཁྱི", ["མ"], ["ཁྱ"]),
        ("a b c", "x y z", ["a b c"], ["x y z"]),
    ],
)
def test_differing_words(source: str, level: str, removed: list[str], added: list[str]) -> None:
    mine, theirs = differences(source, level)
    assert "".join(run.text for run in mine) == source
    assert "".join(run.text for run in theirs) == level
    assert [run.text for run in mine if run.differs] == removed
    assert [run.text for run in theirs if run.differs] == added


def test_long_answers_that_differ_everywhere_are_compared_in_bounded_time() -> None:
    mine = " ".join(f"{at % 7}" for at in range(20_000))
    theirs = " ".join(f"{at % 5}" for at in range(20_000))
    for runs, text in zip(differences(mine, theirs), (mine, theirs), strict=True):
        assert "".join(run.text for run in runs) == text


def test_words_are_the_whole_text() -> None:
    for text in ("", "  a\n\tb—c!", "漢字と kana", "don't 3.14", "\u0e20\u0e32\u0e29\u0e32"):
        assert "".join(words(text)) == text


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (wording.kld(0.0181), "0.0181"),
        (wording.kld(0.00613), "0.00613"),
        (wording.kld(0.00079), "0.000790"),
        (wording.kld(1.5), "1.5000"),
        (wording.kld(0.0), "0.0000"),
        (wording.kld(3.2e-9), "3.20e-09"),
        (wording.kld_error(Estimate(0.0181, 0.00022)), "0.0181 ± 0.0002"),
        (wording.figure(7.32412), "7.324"),
        (wording.figure(18.7249), "18.72"),
        (wording.figure(1e304), "1e+304"),
        (wording.error(Estimate(7.324, 0.11)), "0.110"),
        (wording.difference(Estimate(-0.0904, 0.0161)), "−0.090 ± 0.016"),
        (wording.difference(Estimate(-0.00001, 0.16)), "0.00 ± 0.16"),
        (wording.difference(Estimate(0.5, 0.0)), "+0.5000 ± 0.0000"),
        (wording.difference(Estimate(0.0, 2.8e-7)), "0.0000 ± 0.0000"),
        (wording.percent(-0.00001), "0.0 %"),
        (wording.percent(-0.25), "−25.0 %"),
        (wording.points(0.00417), "+0.42"),
        (wording.percent(0.9264), "92.6 %"),
        (wording.count(8_030_261_312), "8.03 billion"),
        (wording.count(71_680), "71,680"),
        (wording.many(1, "entry", "entries"), "1 entry"),
        (wording.many(1200, "entry", "entries"), "1,200 entries"),
        (wording.moment("2026-07-14T11:02:45+00:00"), "2026-07-14 11:02 UTC"),
        (wording.moment("yesterday\x1b"), "yesterday\ufffd"),
        (safe_text.shown("a\nb\x1b"), "a\ufffdb\ufffd"),
        (safe_text.shown("x" * 300, 5), "xxxxx…"),
        (safe_text.shown_text("a\r\n\tb\x00\u202ec\u200d"), "a\n\tb\ufffd\ufffdc\u200d"),
    ],
)
def test_figures_and_names_are_written_so(told: str, expected: str) -> None:
    assert told == expected


def test_the_charting_library_is_bundled_once_and_a_damaged_copy_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMATRIX_RUNNER_CACHE", str(tmp_path))
    page_module._library.cache_clear()
    script = page_module._library()
    (kept,) = (tmp_path / "report").iterdir()
    whole = kept.read_bytes()
    assert whole.decode().endswith(script)
    kept.write_bytes(whole[:-1000])
    page_module._library.cache_clear()
    assert page_module._library() == script
    assert kept.read_bytes() == whole
    page_module._library.cache_clear()
