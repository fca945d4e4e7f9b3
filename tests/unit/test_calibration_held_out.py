"""A text is split into two by whole passages, always in the same way, and neither part is too short."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.documents.passages import passages
from imatrix_runner.documents.split_text import LEAST_BYTES, MOST_SHARE, split_text
from support.tiny_models import paragraphs

TEXT = paragraphs(150_000)


def test_a_tenth_or_what_it_takes_is_set_aside_by_whole_passages() -> None:
    kept, held = split_text(TEXT)
    assert LEAST_BYTES <= len(held.encode()) <= MOST_SHARE * len(TEXT.encode())
    whole = {passage for passage, _ in passages([TEXT])}
    parts = [{passage for passage, _ in passages([part])} for part in (kept, held)]
    words = [TEXT.split(), [*kept.split(), *held.split()]]
    assert sorted(words[0]) == sorted(words[1])
    assert all(any(line in passage for passage in whole) for part in parts for line in list(part)[:3])
    lines = set(kept.splitlines()) & set(held.splitlines())
    assert lines <= {""}


def test_the_same_text_is_cut_alike_and_not_only_at_its_end() -> None:
    kept, held = split_text(TEXT)
    assert (kept, held) == split_text(TEXT)
    numbers = [int(line.split(".")[0]) for line in held.splitlines() if line]
    assert numbers == sorted(numbers)
    assert numbers[0] < len(TEXT.splitlines()) / 4
    assert numbers[-1] > len(TEXT.splitlines()) / 2


def test_a_short_text_and_one_of_a_single_passage_stay_whole() -> None:
    short = paragraphs(60_000)
    assert split_text(short) == (short, "")
    line = "word " * 40_000
    assert split_text(f"{line}")[1] == "" or len(split_text(line)[1]) <= MOST_SHARE * len(line)


@given(st.text(max_size=300))
def test_any_text_is_cut_or_left_alone(text: str) -> None:
    kept, held = split_text(text * 500)
    if not held:
        assert kept == text * 500
    else:
        assert kept.strip()
