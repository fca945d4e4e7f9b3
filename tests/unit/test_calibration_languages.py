"""Scripts and languages are identified, code is not taken for a language, and short passages are not guessed."""

from __future__ import annotations

import re

import numpy as np
import pytest

from imatrix_runner.calibration.inspect.languages import CODE, SHORT, language_name, language_of, looks_like_code, scripts
from imatrix_runner.calibration.parts import TextPart, shipped_parts
from imatrix_runner.calibration.shingles import codepoints

# How the passages of the shipped text's part "languages" name themselves.
NAMED = {
    "Deutsch": "de",
    "Français": "fr",
    "Español": "es",
    "Português": "pt",
    "Italiano": "it",
    "Nederlands": "nl",
    "Polski": "pl",
    "Русский": "ru",
    "Українська": "uk",
    "Ελληνικά": "el",
    "Türkçe": "tr",
    "Tiếng Việt": "vi",
    "Suomi": "fi",
    "العربية": "ar",
    "עברית": "he",
    "فارسی": "fa",
    "हिन्दी": "hi",
    "中文": "zh",
    "日本語": "ja",
    "한국어": "ko",
    "ภาษาไทย": "th",
}


@pytest.fixture(scope="module")
def parts() -> dict[str, TextPart]:
    return {part.name: part for part in shipped_parts()}


def passages(part: TextPart) -> list[str]:
    return [text for text in re.split(r"\n[ \t]*\n", part.text) if text.strip()]


def code_share(texts: list[str]) -> float:
    """The share by bytes."""
    return sum(len(text.encode()) for text in texts if looks_like_code(text)) / sum(len(text.encode()) for text in texts)


def fenced(part: TextPart) -> list[str]:
    """The text inside fences, without them."""
    return re.findall(r"^```\w+\n(.*?)^```$", part.text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["science-prose", "fiction", "dialogue-roleplay", "question-answer"])
def test_prose_is_hardly_ever_taken_for_code(parts: dict[str, TextPart], name: str) -> None:
    assert code_share([text for text in passages(parts[name]) if len(text) >= 12]) < 0.03


def test_most_code_is_recognised_without_its_fences(parts: dict[str, TextPart]) -> None:
    blocks = fenced(parts["code"])
    assert len(blocks) >= 10
    assert code_share(blocks) > 0.9


def test_most_data_is_recognised(parts: dict[str, TextPart]) -> None:
    assert code_share(passages(parts["structured-data"])) > 0.75


@pytest.mark.parametrize(
    "text",
    [
        '{"id": 7, "note": "a sentence of English in a record is still data", "tags": ["a", "b"]}',
        "```\nAnything between fences, even a sentence.\n```",
        "| name | size | colour |\n|---|---|---|\n| tit | 12 cm | blue |",
        "2024-05-17 03:12:08 INFO nightly compaction done\n2024-05-17 03:12:09 INFO sleeping until tomorrow",
        "SELECT region, sum(amount)\nFROM sales\nWHERE year = 2024\nGROUP BY region;",
    ],
)
def test_code_and_data_are_no_language(text: str) -> None:
    assert language_of(text) == CODE


@pytest.mark.parametrize(("name", "code"), NAMED.items())
def test_the_shipped_languages_are_told(parts: dict[str, TextPart], name: str, code: str) -> None:
    texts = [text for text in passages(parts["languages"]) if text.startswith(name)]
    assert texts
    assert {language_of(text) for text in texts} == {code}
    without_its_name = texts[0][len(name) :]
    assert language_of(without_its_name) == code


def test_three_words_are_not_guessed_from() -> None:
    assert language_of("Guten Morgen, Welt") == SHORT
    assert language_of("早上好，世界") == SHORT
    assert language_of("* * *") == SHORT
    assert language_of("") == SHORT


def test_capitals_are_a_language_too() -> None:
    assert language_of("NICHT ÜBER FÜNFUNDZWANZIG GRAD LAGERN UND FÜR KINDER UNZUGÄNGLICH AUFBEWAHREN, BITTE!") == "de"


def test_languages_have_names() -> None:
    assert [language_name(code) for code in ("de", "code", "short", "xx")] == [
        *("German", "code or data", "too short to tell", "xx")
    ]
    assert all(language_name(code) != code for code in NAMED.values())


def counts(text: str) -> np.ndarray:
    return np.bincount(codepoints(text), minlength=0x110000)


def test_scripts_are_counted_by_letters_and_their_marks() -> None:
    found = scripts(counts("Aa aé 12,5 % Жж हि 漢字カナ ー 😀"))
    assert [(share.code, share.letters, share.distinct) for share in found] == [
        ("Latn", 4, 3),
        ("Cyrl", 2, 2),
        ("Deva", 2, 2),
        ("Hani", 2, 2),
        ("Kana", 2, 2),
    ]
    assert [share.name for share in found] == ["Latin", "Cyrillic", "Devanagari", "Han", "Katakana"]
    assert sum(share.share for share in found) == pytest.approx(1)


def test_a_text_without_letters_has_no_script() -> None:
    assert scripts(counts("12 + 30 = 42 😀")) == ()
