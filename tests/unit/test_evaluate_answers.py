"""How far two answers agree, and which of them are kept for people to read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.measures import Completion
from imatrix_runner.evaluate.answer_agreement import SHOWN, DomainResult, common_tokens, compare_answers

IDS = st.lists(st.integers(0, 4), max_size=40)


def answer(*ids: int, text: str = "words") -> Completion:
    return Completion(0, 3, ids, False, text)


def compared(*pairs: tuple[Completion, Completion]) -> DomainResult:
    return compare_answers(
        "Q4_K_M", [f"prompt {n}" for n in range(len(pairs))], [a for a, _ in pairs], [b for _, b in pairs], 128
    )


def test_a_pair_that_parts() -> None:
    [pair] = compared((answer(1, 2, 3, 4, 5), answer(1, 2, 9, 4, 5, 6))).pairs
    assert (pair.n_source, pair.n_level, pair.agreement, pair.parted) == (5, 6, 2, 2)
    assert pair.shared == 2 * 4 / 11


def test_an_answer_that_goes_on_parts_where_the_other_ends() -> None:
    [pair] = compared((answer(1, 2), answer(1, 2, 3))).pairs
    assert (pair.agreement, pair.parted) == (2, 2)


@pytest.mark.parametrize("ids", [(), (7,), (1, 2, 3)])
def test_the_same_answer_never_parts(ids: tuple[int, ...]) -> None:
    [pair] = compared((answer(*ids), answer(*ids))).pairs
    assert (pair.parted, pair.agreement, pair.shared) == (None, len(ids), 1.0)


def test_nothing_beside_something_shares_nothing() -> None:
    [pair] = compared((answer(), answer(1))).pairs
    assert (pair.parted, pair.agreement, pair.shared) == (0, 0, 0.0)


def test_the_figures_of_a_level_are_over_all_prompts() -> None:
    result = compared(
        (answer(1, 2, 3, 4), answer(1, 2, 3, 4)), (answer(1, 2), answer(1, 3)), (answer(5, 6, 7, 8, 9), answer(5, 6, 7, 0, 9))
    )
    assert (result.level, result.n_prompts, result.n_predict) == ("Q4_K_M", 3, 128)
    assert result.same == pytest.approx(1 / 3)
    assert result.shared == pytest.approx((1 + 1 / 2 + 8 / 10) / 3)
    assert result.agreement_mean == pytest.approx((4 + 1 + 3) / 3)
    assert result.agreement_median == 3.0


def test_answers_of_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare_answers("Q4_K_M", ["a", "b"], [answer(1)] * 2, [answer(1)], 8)


def slow_common(one: list[int], other: list[int]) -> int:
    row = [0] * (len(other) + 1)
    for token in one:
        before = 0
        for at, theirs in enumerate(other):
            here = row[at + 1]
            row[at + 1] = before + 1 if token == theirs else max(row[at + 1], row[at])
            before = here
    return row[-1]


@given(IDS, IDS)
def test_tokens_in_common_are_those_of_the_textbook(one: list[int], other: list[int]) -> None:
    assert common_tokens(one, other) == slow_common(one, other)


def test_only_the_first_pairs_are_kept_and_the_figures_know_them_all() -> None:
    same, other = (answer(1), answer(1)), (answer(1), answer(2))
    result = compared(*[same] * SHOWN, *[other] * SHOWN)
    assert len(result.pairs) == SHOWN
    assert (result.n_prompts, result.same) == (2 * SHOWN, 0.5)


def test_long_texts_are_cut_and_many_of_them_bounded() -> None:
    wordy = answer(1, text="ä" * 100_000)
    result = compared(*[(wordy, wordy)] * 150)
    assert result.n_prompts == 150
    assert all(len(pair.source) < 5000 for pair in result.pairs)
    assert 20 < len(result.pairs) < 150
    assert sum(len((pair.prompt + pair.source + pair.level).encode()) for pair in result.pairs) <= 1 << 20


def test_what_a_terminal_might_obey_is_not_kept() -> None:
    [pair] = compared((answer(1, text="a\x1b[2Jb\x9bc\u202ed\r\n\te\u3000f\u200d"), answer(1))).pairs
    assert pair.source == "a\ufffd[2Jb\ufffdc\ufffdd\ufffd\n\te\u3000f\u200d"
