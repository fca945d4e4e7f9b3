"""Exact and near duplicates are found; different texts are not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from imatrix_runner.calibration.build import duplicates as module
from imatrix_runner.calibration.build.duplicates import NearDuplicates, Repeats, likeness
from imatrix_runner.calibration.parts import part_documents, shipped_parts
from imatrix_runner.calibration.shingles import character_shingles
from support.tiny_models import sample_text


@pytest.fixture(scope="module")
def prose() -> list[str]:
    """Distinct paragraphs of more than 300 characters."""
    texts = [text for part in shipped_parts() for text, _ in part_documents(part.text)]
    return [text[:2000] for text in texts if len(text) > 300][:120]


def jaccard(one: str, other: str) -> float:
    """The Jaccard similarity, computed the slow way, by sets of strings."""
    plain = [" ".join(text.casefold().split()) for text in (one, other)]
    sets = [{text[start : start + 9] for start in range(len(text) - 8)} for text in plain]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: str, n: int, chooser: random.Random) -> str:
    """The text with ``n`` words changed."""
    words = text.split()
    for place in chooser.sample(range(len(words)), min(n, len(words))):
        words[place] = f"<{chooser.randrange(10**6)}>"
    return " ".join(words)


def test_different_texts_are_all_new(prose: list[str]) -> None:
    finder = NearDuplicates(0.8)
    assert [finder.add(text) for text in prose] == [None] * len(prose)


def test_an_equal_text_is_told_the_number_of_the_first(prose: list[str]) -> None:
    finder = NearDuplicates(0.8)
    assert [finder.add(text) for text in (prose[0], prose[1], prose[0], prose[2], prose[1], prose[0])] == [
        *(None, None, 0, None, 1, 0)
    ]


def test_what_is_found_has_the_likeness_asked_for_and_little_is_missed(prose: list[str]) -> None:
    chooser = random.Random(5)
    finder = NearDuplicates(0.8)
    for text in prose:
        finder.add(text)
    near = missed = far = 0
    for number, text in enumerate(prose):
        other = edited(text, chooser.randint(1, max(1, len(text.split()) // 12)), chooser)
        found, real = finder.add(other), jaccard(text, other)
        if real >= 0.8:
            near += 1
            missed += found is None
        else:
            far += 1
        assert found == (number if real >= 0.8 and found is not None else None)
    assert near > 20
    assert far > 20
    assert missed <= 0.05 * near


def test_likeness_is_the_jaccard_of_stretches_of_nine_characters(prose: list[str]) -> None:
    chooser = random.Random(1)
    for text in prose[:20]:
        other = edited(text, 10, chooser)
        assert likeness(character_shingles(text), character_shingles(other)) == pytest.approx(jaccard(text, other), abs=1e-12)


def test_white_space_and_case_do_not_make_a_text_new(prose: list[str]) -> None:
    finder = NearDuplicates(0.8)
    finder.add(prose[0])
    assert finder.add(prose[0].upper().replace(" ", "\n  ")) == 0


def test_short_texts_must_be_equal() -> None:
    finder = NearDuplicates(0.8)
    assert finder.add("Good morning, Vietnam!") is None
    assert finder.add("Good morning, Vietnam?") is None
    assert finder.add("good morning,  vietnam!") == 0


def test_long_texts_are_compared_by_a_sample_of_their_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_SHINGLES", 2048)
    words = [f"{number:x}" for number in random.Random(2).sample(range(16**6), 12_000)]
    text = " ".join(words)
    changed = " ".join(word if place % 20 else "changed" for place, word in enumerate(words))
    real = jaccard(text, changed)
    cut = [character_shingles(each)[:2048] for each in (text, changed)]
    assert likeness(*cut) == pytest.approx(real, abs=0.04)
    finder = NearDuplicates(real - 0.06)
    assert finder.add(text) is None
    assert finder.add(changed) == 0
    assert finder.add(" ".join(reversed(words))) is None


def test_filled_in_forms_take_bounded_work(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0

    def counting(one: module.U64, other: module.U64) -> float:
        nonlocal compared
        compared += 1
        return likeness(one, other)

    monkeypatch.setattr(module, "likeness", counting)
    monkeypatch.setattr(module, "_MOST_COMPARED", 8)
    chooser = random.Random(3)
    form = sample_text(900)
    finder = NearDuplicates(0.9)
    for _ in range(200):
        finder.add(form + " ".join(f"{chooser.randrange(10**9)}" for _ in range(25)))
    assert compared <= 8 * 200


def test_beyond_the_limit_texts_are_compared_with_the_first(prose: list[str]) -> None:
    finder = NearDuplicates(0.8, most=2)
    assert [finder.add(text) for text in prose[:4]] == [None] * 4
    assert finder.full
    assert [finder.add(text) for text in prose[:4]] == [0, 1, None, None]


def test_stretches_have_the_same_hashes_in_every_process() -> None:
    assert character_shingles("A  LIGHTHOUSE").tolist() == [
        *(5367656676922766498, 8726081103461746762, 11308549725479770439, 14229149592329556046)
    ]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1])
def test_a_threshold_outside_its_range_is_a_mistake(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold"):
        NearDuplicates(threshold)


def test_a_full_disk_is_told_as_such(prose: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    from imatrix_runner.errors import NoSpaceError

    finder = NearDuplicates()
    with Path("/dev/full").open("r+b", buffering=0) as full:
        finder.__dict__["_file"] = full
        with pytest.raises(NoSpaceError, match="comparing texts"):
            finder.add(prose[0])


def test_repeats_are_counted_with_their_bytes_and_told() -> None:
    repeats = Repeats()
    for text in ("one line", "another", "one line", "a third", "one line", "another"):
        repeats.add(text, len(text))
    assert (repeats.n, repeats.repeated, repeats.repeated_bytes) == (6, 3, 8 + 8 + 7)
    assert repeats.examples(5) == [("one line", 3), ("another", 2)]
    assert not repeats.estimated


@pytest.mark.parametrize("most", [200, 3000])
def test_beyond_its_memory_repeats_are_estimated(most: int) -> None:
    chooser = random.Random(4)
    texts = [f"line {chooser.randrange(20_000)}" for _ in range(50_000)]
    # One line a thousand times must not be multiplied with all the others that are not followed.
    texts += ["again and again"] * 1000
    chooser.shuffle(texts)
    repeats = Repeats(most=most)
    for text in texts:
        repeats.add(text, 10)
    real = len(texts) - len(set(texts))
    assert repeats.estimated
    assert len(repeats._counts) <= most
    assert repeats.repeated == pytest.approx(real, rel=0.1)
    assert repeats.repeated_bytes == pytest.approx(10 * real, rel=0.1)
