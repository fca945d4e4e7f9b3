"""The overlap of two texts is measured by sequences of 13 words, or 40 characters in scripts without spaces."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.calibration.inspect import overlap as module
from imatrix_runner.calibration.inspect.overlap import Overlap, overlap, overlap_files, verdict
from imatrix_runner.calibration.shingles import overlap_shingles, units
from imatrix_runner.documents import blocks
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.resources import CALIBRATION_TEXT, resource

WORDS = [f"word{number}" for number in range(5000)]


def words(first: int, last: int) -> str:
    return " ".join(WORDS[first:last])


def by_hand(calibration: str, held_out: str) -> float:
    """The share for words separated by spaces, computed the slow way."""

    def stretches(text: str) -> list[tuple[str, ...]]:
        found = re.findall(r"\w+", text.lower())
        return [tuple(found[start : start + 13]) for start in range(len(found) - 12)]

    known, asked = set(stretches(calibration)), stretches(held_out)
    return sum(stretch in known for stretch in asked) / len(asked) if asked else 0.0


def test_nothing_in_common_is_none() -> None:
    found = overlap(words(0, 1000), words(1000, 2000))
    assert found == Overlap(0.0, 988, 0, "", 988)
    assert verdict(found) == "none"


def test_the_share_is_that_of_the_held_out_stretches() -> None:
    found = overlap(words(0, 1000), words(900, 1112))
    assert found.n_shingles == 200
    assert found.share == 88 / 200
    assert verdict(found) == "void"
    assert found.longest == len(words(900, 1000))
    assert found.example.startswith("word900 word901 ")
    assert found.example.endswith("…")


@given(st.lists(st.sampled_from("ab"), max_size=200), st.lists(st.sampled_from("ab"), max_size=60))
def test_the_share_is_what_counting_by_hand_gives(one: list[str], other: list[str]) -> None:
    assert overlap(" ".join(one), " ".join(other)).share == by_hand(" ".join(one), " ".join(other))


def test_case_punctuation_and_white_space_do_not_hide_a_quotation() -> None:
    quoted = "It was the keeper's habit to clean the lamp at six and to read the log aloud at seven."
    dressed = "IT WAS — the keeper’s habit,\n\n  to clean the lamp (at six) and to READ the log: aloud; at seven!"
    assert overlap(quoted, dressed).share == 1.0


def test_a_script_without_spaces_is_compared_by_characters() -> None:
    passage = "老城的修伞匠说一把好伞要经得起三场风春天的乱风夏天的急风还有冬天从巷口直灌进来的冷风他不卖新伞只换骨换面换柄"
    assert len(passage) >= 50
    found = overlap(f"前言。{passage}。后记", f"别的开头，{passage}，别的结尾也不一样。")
    assert found.longest == len(passage)
    assert found.example == passage
    assert overlap(passage[:39], passage[:39]).n_shingles == 0


def test_mixed_scripts_are_one_row_of_words_and_characters() -> None:
    found = units("The 東京 train")
    assert found.weights.tolist() == [40, 13, 13, 40]
    assert found.starts.tolist() == [0, 4, 5, 7]
    assert found.ends.tolist() == [3, 5, 6, 12]


def test_vowel_signs_belong_to_their_word() -> None:
    assert len(units("हिन्दी में").hashes) == 2


def test_too_short_a_text_cannot_be_told() -> None:
    assert overlap(words(0, 100), words(0, 12)) == Overlap(0.0, 0, 0, "", 0)
    assert overlap(words(0, 100), words(0, 13)).share == 1.0
    assert overlap("", "") == Overlap(0.0, 0, 0, "", 0, identical=True)


@pytest.mark.parametrize(
    ("share", "identical", "expected"),
    [
        (0.0, False, "none"),
        (0.0099, False, "none"),
        (0.01, False, "some"),
        (0.1999, False, "some"),
        (0.2, False, "void"),
        (0.0, True, "void"),
    ],
)
def test_verdicts_have_their_documented_thresholds(share: float, identical: bool, expected: str) -> None:
    assert verdict(Overlap(share, 1000, 0, "", 1000, identical)) == expected


def test_how_a_text_is_cut_into_pieces_does_not_matter() -> None:
    text = words(0, 400)
    whole = next(iter(overlap_shingles([text])))
    cut_at_spaces = re.findall(r".{1,100}(?: |$)", text)
    assert "".join(cut_at_spaces) == text
    found = list(overlap_shingles(cut_at_spaces))
    assert np.concatenate([each.hashes for each in found]).tolist() == whole.hashes.tolist()
    assert np.concatenate([each.starts for each in found]).tolist() == whole.starts.tolist()
    assert np.concatenate([each.ends for each in found]).tolist() == whole.ends.tolist()
    assert len(found) > 10


def test_files_are_compared_like_strings_across_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 1000)
    ours, theirs = tmp_path / "ours.txt", tmp_path / "theirs.txt"
    ours.write_text(words(0, 3000), encoding="utf-8")
    theirs.write_text("ünlike " * 50 + words(2000, 2600) + " other" * 300, encoding="utf-8")
    far: list[int] = []
    found = overlap_files(ours, theirs, far.append)
    assert found == overlap(ours.read_text(encoding="utf-8"), theirs.read_text(encoding="utf-8"))
    assert found.example.startswith("word2000 word2001")
    assert far[-1] == ours.stat().st_size
    assert len(far) > 10
    assert not found.identical


def test_the_same_bytes_are_void_however_short(tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    for path in (one, other):
        path.write_text("Three words only", encoding="utf-8")
    assert verdict(overlap_files(one, other)) == "void"


def test_a_held_out_text_that_is_none_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "ours.txt").write_text("text")
    (tmp_path / "held.txt").write_bytes(b"\xff\xfe\0t")
    with pytest.raises(InvalidDataError, match=r"held\.txt cannot be used as held-out text"):
        overlap_files(tmp_path / "ours.txt", tmp_path / "held.txt")


def test_of_a_huge_held_out_text_a_sample_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 400)
    monkeypatch.setattr(module, "_BLOCK", 5000)
    found = overlap(words(0, 2500), words(0, 5000))
    assert found.n_shingles == 4988
    assert 100 < found.n_compared <= 400
    assert found.share == pytest.approx(0.5, abs=0.1)
    assert found.longest == pytest.approx(len(words(0, 2500)), rel=0.05)


def test_an_example_cannot_command_a_terminal() -> None:
    shared = " ".join(f"{word}\x07" for word in words(0, 20).split())
    assert "\x07" not in overlap(shared, shared).example
    assert "\ufffd" in overlap(shared, shared).example


def test_no_part_of_the_shipped_text_contains_another() -> None:
    text = resource(CALIBRATION_TEXT).read_text(encoding="utf-8")
    middle = text.index("\n\n", len(text) // 2)
    assert verdict(overlap(text[:middle], text[middle:])) == "none"
