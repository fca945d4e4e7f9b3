"""Documents are chosen reproducibly by seed, in proportion to weights, and within the budget."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.calibration.build.composing import lay_out
from imatrix_runner.calibration.build.mixing import Document, Reservoir, balanced_budget, choose, fair_shares, shuffled
from imatrix_runner.documents.documents import Conversation, DocumentRecord


def reservoir(texts: Sequence[str], seed: int | None, limit: int | None) -> Reservoir:
    made = Reservoir(seed, limit)
    for number, text in enumerate(texts):
        made.add(DocumentRecord(text, f"line {number}"))
    return made


def contents(made: Reservoir) -> list[object]:
    return [candidate.record.content for candidate in made.in_order()]


def document(source: int, name: str, size: int, *, chat: bool = False) -> Document:
    return Document(source, f"{source} {name}".encode(), name, name, chat, chat, size)


TEXTS = st.lists(st.text(alphabet="abcdefgh ", min_size=1, max_size=30), min_size=1, max_size=60)


@given(TEXTS, st.integers(0, 5), st.integers(1, 400))
def test_a_limited_reservoir_holds_the_beginning_of_the_unlimited_one(texts: list[str], seed: int, limit: int) -> None:
    whole, held = contents(reservoir(texts, seed, None)), contents(reservoir(texts, seed, limit))
    assert held == whole[: len(held)]
    n_bytes = sum(len(str(text).strip()) for text in held)
    assert n_bytes >= limit or held == whole
    assert len(held) <= 1 or n_bytes - len(str(held[-1]).strip()) < limit


@given(TEXTS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_the_order_of_a_stream_does_not_matter_to_a_seeded_choice(texts: list[str], seed: int, rng: random.Random) -> None:
    again = list(texts)
    rng.shuffle(again)
    first, second = ([str(content).strip() for content in contents(reservoir(some, seed, 100))] for some in (texts, again))
    assert first == second


def test_another_seed_chooses_others() -> None:
    texts = [f"document number {number}" for number in range(200)]
    chosen = [tuple(map(str, contents(reservoir(texts, seed, 500)))) for seed in range(5)]
    assert len(set(chosen)) == 5


def test_without_a_seed_the_stream_s_own_order_is_kept() -> None:
    texts = [f"document number {number}" for number in range(200)]
    held = contents(reservoir(texts, None, 500))
    assert held == texts[: len(held)]
    assert 10 < len(held) < 40


def test_equal_documents_are_held_once_however_they_are_padded() -> None:
    made = reservoir(["one", " one\n", "two", "one"], 1, None)
    assert (made.seen, made.duplicates, len(made.in_order())) == (4, 2, 2)


def test_conversations_are_equal_by_all_of_their_content() -> None:
    made = Reservoir(1, None)
    for content, tools in (("a", ()), ("a", ()), ("b", ()), ("a", ({"name": "f"},))):
        made.add(DocumentRecord(Conversation(({"role": "user", "content": content},), tools), "somewhere"))
    assert (made.duplicates, len(made.in_order())) == (1, 3)


def test_shares_follow_the_weights_and_what_one_lacks_the_others_give() -> None:
    assert fair_shares([1, 1], [1000, 1000], 100) == [50, 50]
    assert fair_shares([3, 1], [1000, 1000], 100) == [75, 25]
    assert fair_shares([1, 1, 2], [10, 1000, 1000], 100) == [10, 30, 60]
    assert fair_shares([1, 1], [10, 20], 100) == [10, 20]
    assert balanced_budget([3, 1], [300, 1000]) == 400


@given(
    st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 1000)), min_size=1, max_size=6),
    st.integers(1, 3000),
)
def test_shares_never_exceed_what_there_is_and_use_up_the_budget(sources: list[tuple[float, int]], budget: int) -> None:
    weights, available = [weight for weight, _ in sources], [have for _, have in sources]
    shares = fair_shares(weights, available, budget)
    assert all(share <= have + 1e-6 for share, have in zip(shares, available, strict=True))
    assert sum(shares) == pytest.approx(min(budget, sum(available)))


DOCUMENTS = st.lists(st.lists(st.integers(1, 120), max_size=30), min_size=1, max_size=4)


@given(DOCUMENTS, st.integers(1, 900))
def test_whole_documents_are_chosen_up_to_the_budget(sizes: list[list[int]], budget: int) -> None:
    sources = [[document(i, str(j), size) for j, size in enumerate(some)] for i, some in enumerate(sizes)]
    choice = choose(sources, [1.0] * len(sources), budget, lambda _: False)
    assert choice.size <= budget
    left = [each for some in choice.left for each in some]
    assert sorted(each.digest for each in [*choice.taken, *left]) == sorted(d.digest for some in sources for d in some)
    # What was left out would not have fitted.
    assert all(choice.size + each.size > budget for each in left)


def test_weights_decide_how_much_of_each_source_is_taken() -> None:
    sources = [[document(i, str(j), 10) for j in range(100)] for i in range(2)]
    choice = choose(sources, [3, 1], 400, lambda _: False)
    assert sum(1 for each in choice.taken if each.source == 0) == 30
    assert choice.size == 400


def test_a_document_of_two_sources_is_taken_once() -> None:
    one = Document(0, b"same", "a", "same", False, False, 5)
    other = Document(1, b"same", "b", "same", False, False, 5)
    choice = choose([[one], [other]], [1, 1], None, lambda _: False)
    assert choice.taken == [one]
    assert choice.duplicates == [0, 1]


def test_what_is_nearly_the_same_is_passed_over_and_others_take_its_place() -> None:
    sources = [[document(0, str(j), 10) for j in range(30)]]
    choice = choose(sources, [1.0], 100, lambda each: int(each.where) % 2 == 1)
    assert [each.where for each in choice.taken] == [str(j) for j in range(0, 20, 2)]
    assert choice.near_duplicates == [9]


def test_the_text_s_order_is_mixed_by_the_seed_and_kept_without_one() -> None:
    documents = [document(j % 2, str(j), 1) for j in range(40)]
    assert shuffled(documents, None) == documents
    assert shuffled(documents, 1) == shuffled(list(reversed(documents)), 1)
    assert shuffled(documents, 1) != shuffled(documents, 2)
    assert sorted(shuffled(documents, 1), key=lambda each: int(each.where)) == documents


@given(st.lists(st.integers(1, 150), max_size=60), st.integers(8, 64), st.integers(1, 12) | st.none())
def test_every_chunk_of_a_layout_begins_with_a_document(sizes: list[int], n_ctx: int, chunks: int | None) -> None:
    documents = [document(0, str(j), size) for j, size in enumerate(sizes)]
    budget = chunks * n_ctx if chunks is not None else None
    layout = lay_out(documents, n_ctx, budget, lambda _document, keep: 1 + keep % 2)
    starts, position = set(), 0
    for number, each in enumerate(layout.documents):
        starts.add(position)
        assert number not in layout.cuts or layout.cuts[number] < each.size
        position += layout.cuts.get(number, each.size)
    within, place = set(), 0
    for number, each in enumerate(layout.documents):  # chunks that a longer document goes on in
        length = layout.cuts.get(number, each.size)
        if place % n_ctx == 0:
            within |= set(range(place + n_ctx, place + length, n_ctx))
        place += length
    assert layout.loose == 0
    assert all(start in starts | within for start in range(0, position, n_ctx))
    assert len({each.where for each in layout.documents}) == len(layout.documents)
    if budget is not None:
        assert position == budget or len(layout.documents) == len(documents)


def test_where_nothing_may_be_cut_a_document_goes_on_in_the_next_chunk_and_that_is_counted() -> None:
    layout = lay_out([document(0, "a", 6), document(0, "b", 6), document(0, "c", 8)], 8, None, lambda _d, _k: 0)
    assert [each.where for each in layout.documents] == ["a", "b", "c"]
    assert layout.loose == 2
    assert not layout.cuts
