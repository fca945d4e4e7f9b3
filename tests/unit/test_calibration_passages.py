"""Texts are cut at natural boundaries without loss; a shipped part is split into its documents."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.calibration.parts import TextPart, parse_parts, part_documents, part_records, shipped_parts
from imatrix_runner.documents.passages import LINE, PASSAGE, SECTION, WHOLE, code, passages
from imatrix_runner.documents.records import Cut
from imatrix_runner.errors import UsageError
from imatrix_runner.resources import CALIBRATION_TEXT, resource

WORDS = "the tide came in over the flats and nobody had moved the boats"


def paragraph(n_bytes: int, mark: str = "") -> str:
    """Lines of words, about ``n_bytes`` of them."""
    return mark + (WORDS + "\n") * max(1, n_bytes // (len(WORDS) + 1))


def texts(*blocks: str) -> list[str]:
    return [text for text, _ in passages(blocks)]


def without_breaks(text: str) -> str:
    return "".join(line for line in text.split("\n") if line.strip())


LINES = st.sampled_from(
    [
        "",
        "",
        "   ",
        "prose of some length that goes on",
        "# Heading",
        "```",
        "```python",
        "~~~",
        "    indented",
        "\tx",
        "é — 漢字 🥊 ",
    ]
)
DOCUMENTS = st.lists(st.tuples(LINES, st.integers(1, 120)), max_size=60).map(
    lambda runs: "\n".join(line for line, times in runs for _ in range(times))
)


@given(text=DOCUMENTS, cuts=st.lists(st.integers(0, 5000), max_size=6))
@pytest.mark.parametrize("cut", [passages, code])
def test_nothing_is_lost_but_blank_lines_however_the_text_arrives(cut: Cut, text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(place, len(text)) for place in cuts)})
    found = list(cut(text[start:end] for start, end in pairwise(places)))
    assert "".join(without_breaks(block) for block, _ in found) == without_breaks(text)
    assert found == list(cut([text]))
    lines = text.split("\n")
    for block, number in found:
        first = block.split("\n", 1)[0]
        assert first.strip()
        assert lines[number - 1] == first  # no line here is long enough to be cut inside


@given(words=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=200), max_size=400))
def test_a_line_of_any_length_keeps_every_character(words: list[str]) -> None:
    line = " ".join(words) * 40
    assert "".join(texts(line)).replace(" ", "") == line.replace(" ", "") or not line.strip()


def test_paragraphs_are_gathered_until_they_are_enough() -> None:
    found = texts("\n".join(paragraph(600) for _ in range(20)))
    assert all(PASSAGE <= len(text) < PASSAGE + 700 for text in found[:-1])
    assert [text.count("\n\n") for text in found[:-1]] == [3] * (len(found) - 1)


def test_a_heading_begins_a_passage_once_there_is_a_section() -> None:
    short, long = paragraph(SECTION // 2), paragraph(2 * SECTION)
    assert texts(f"{short}\n# One\n\n{long}\n## Two\n\n{short}") == [
        f"{short}\n# One\n\n{long}".rstrip(),
        f"## Two\n\n{short}".rstrip(),
    ]


@pytest.mark.parametrize("line", ["#!/bin/sh", "#hashtag", "####### seven"])
def test_what_only_begins_with_a_hash_is_no_heading(line: str) -> None:
    assert len(texts(f"{paragraph(SECTION + 100)}\n{line}\n\nmore")) == 1


def test_a_comment_in_fenced_code_is_no_heading() -> None:
    fenced = f"```sh\n{paragraph(800)}\n# not a heading\n\n{paragraph(800)}```"
    assert texts(fenced) == [fenced]


@pytest.mark.parametrize("marks", ["```", "~~~~", "`````"])
def test_fenced_code_stays_whole_over_blank_lines(marks: str) -> None:
    block = f"{marks}python\n" + "x = 1\n\n\n\n" * 1200 + marks
    before, after = paragraph(PASSAGE - 300), paragraph(500)
    assert WHOLE > len(block) > 5 * PASSAGE
    assert texts(f"{before}{block}\n{after}") == [f"{before}{block}", after.rstrip()]


def test_a_fence_closes_with_its_own_kind_only() -> None:
    block = "````md\n```\n" + "inner\n\n" * 600 + "```\n~~~~\n" + "inner\n\n" * 600 + "`````"
    assert texts(f"{block}\n\nafter") == [block, "after"]


def test_code_longer_than_the_limit_is_cut_and_its_end_is_still_known() -> None:
    block = "```\n" + "value = 1\n\n" * 4000 + "```"
    after = paragraph(300)
    found = texts(f"{block}\n\n{after}\n# Heading\n")
    assert max(map(len, found)) <= WHOLE + PASSAGE
    assert len(found) > 2
    assert without_breaks("".join(found)) == without_breaks(f"{block}{after}# Heading")
    assert found[-1].endswith("# Heading")  # outside the fence: gathered, not swallowed


def test_an_underlined_title_opens_no_fence() -> None:
    text = "\n".join(f"Title\n~~~~~\n\n{paragraph(1200)}" for _ in range(8))
    assert len(texts(text)) == 4


def test_a_paragraph_beyond_the_limit_is_cut_at_line_ends() -> None:
    text = paragraph(5 * WHOLE)
    found = texts(text)
    assert all(WHOLE - 100 < len(each) <= WHOLE for each in found[:-1])
    assert "\n".join(found) == text.rstrip("\n")


def test_a_line_beyond_the_limit_is_cut_after_spaces() -> None:
    line = "Straße 漢字 🥊 " * 30_000
    found = texts(line)
    assert "".join(found) == line
    assert all(LINE // 2 < len(each.encode()) <= LINE for each in found[:-1])
    assert all(each.endswith(" ") for each in found)


def test_a_line_without_spaces_is_cut_between_characters() -> None:
    line = "漢" * 100_000
    found = texts(line)
    assert "".join(found) == line
    assert all(LINE - 3 <= len(each.encode()) <= LINE for each in found[:-1])


def test_runs_of_blank_lines_become_two() -> None:
    assert texts("a\n\n\n\n\n\nb\n\n\n  \n") == ["a\n\n\nb"]


def test_only_newlines_end_lines() -> None:
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f\rg"
    assert list(passages([text])) == [(text, 1)]


@pytest.mark.parametrize("text", ["", "\n", " \n\t\n"])
def test_nothing_comes_of_nothing(text: str) -> None:
    assert list(passages([text])) == list(code([text])) == []


def function(name: str, lines: int) -> str:
    return f"def {name}():\n" + "    total += 1\n\n" * lines + "    return total\n\n\n"


def test_code_up_to_the_limit_stays_whole() -> None:
    source = "\n\nimport os\n\n\n" + function("first", 200) + function("second", 200)
    assert list(code([source])) == [(source.strip("\n"), 3)]


def test_longer_code_is_cut_before_what_is_not_indented() -> None:
    source = "".join(function(f"number_{number}", 300) for number in range(12))
    found = list(code([source]))
    assert len(found) > 2
    assert all(text.startswith("def number_") and len(text) <= WHOLE for text, _ in found)
    lines = source.split("\n")
    assert [lines[number - 1] for _, number in found] == [text.split("\n")[0] for text, _ in found]


def test_a_function_beyond_the_limit_is_cut_at_line_ends() -> None:
    source = "import os\n\n" + function("long", 3000) + function("short", 2)
    found = [text for text, _ in code([source])]
    assert found[0] == "import os"
    assert max(len(text) for text in found) <= WHOLE
    assert "".join(map(without_breaks, found)) == without_breaks(source)
    assert found[-1].endswith(function("short", 2).strip())


LABELLED = "A licence.\n\n=== part: one ===\n\nFirst.\n\n=== part: two words ===\r\nSecond.\n\n\n=== part: none ===\n"


def test_labels_part_a_text() -> None:
    assert parse_parts(LABELLED) == (
        TextPart("one", "First.", 5),
        TextPart("two words", "Second.", 8),
        TextPart("none", "", 12),
    )


@pytest.mark.parametrize("text", ["", "no labels", "=== part: ===\nx", "  === part: x ===\ny", "=== part: \x1b[2J ===\nx"])
def test_a_text_without_labels_has_no_parts(text: str) -> None:
    assert parse_parts(text) == ()


def test_scenes_stay_whole() -> None:
    scene = f"[Scene]\n\nA: {paragraph(3 * PASSAGE)}\n\nB: Yes."
    assert list(part_documents(f"{scene}\n\n---\n\nsecond\n\n---\n")) == [(scene, 1), ("second", scene.count("\n") + 5)]


def test_a_mark_of_another_language_parts_no_scenes() -> None:
    text = "front:\n  matter: 1\n---\n- name: play\n\n---\n- hosts: all"
    assert list(part_documents(text)) == [(text, 1)]


def test_every_character_of_the_shipped_text_is_in_a_document_of_some_part() -> None:
    shipped = resource(CALIBRATION_TEXT).read_text(encoding="utf-8")
    lines = shipped.split("\n")
    parts = shipped_parts()
    assert len(parts) >= 10
    for part in parts:
        records = list(part_records(part.name))
        joined = "".join(without_breaks(str(record.content)) for record in records)
        assert joined == without_breaks(part.text.replace("\n\n---\n\n", "\n\n"))
        for record in records:
            name, _, number = record.where.rpartition(", line ")
            assert name == CALIBRATION_TEXT
            assert str(record.content).split("\n")[0] == lines[int(number) - 1]


def test_fenced_code_of_the_shipped_text_stays_whole() -> None:
    for record in part_records("code"):
        fences = [line for line in str(record.content).split("\n") if line.startswith("```")]
        assert len(fences) % 2 == 0
        assert set(fences[1::2]) == {"```"}


def test_dialogue_is_parted_into_scenes() -> None:
    part = next(part for part in shipped_parts() if part.name == "dialogue-roleplay")
    assert len(list(part_records("dialogue-roleplay"))) == part.text.count("\n---\n") + 1 > 5


def test_an_unknown_part_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="No shipped part 'ficton'") as caught:
        part_records("ficton")
    assert caught.value.why == "did you mean fiction?"
    with pytest.raises(UsageError) as caught:
        part_records("\x1b[2J")
    assert "\x1b" not in f"{caught.value.what}{caught.value.why}"
    assert "science-prose" in caught.value.why
