"""The worker's arithmetic: which tokens go together, squares per column and expert, and the score of predictions."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.jobs import CollectOptions, Perplexity
from imatrix_runner.engines.worker.batching import batches, largest, micro_batches
from imatrix_runner.engines.worker.collect import sums_file
from imatrix_runner.engines.worker.collect.activations import column_squares, expert_squares, fold, slice_squares
from imatrix_runner.engines.worker.collect.graph_callback import CollectedEntry
from imatrix_runner.engines.worker.evaluate.logit_math import score

sizes = st.integers(1, 5).flatmap(
    lambda times: st.tuples(st.integers(2, 300), st.integers(1, 600)).map(
        lambda sizes: CollectOptions(n_ctx=sizes[0], n_batch=sizes[0] * times, n_ubatch=sizes[1])
    )
)


@given(sizes, st.integers(0, 50), st.integers(1, 40))
def test_every_token_of_every_chunk_is_computed_once(options: CollectOptions, first: int, count: int) -> None:
    seen = [chunk for batch in batches(first, count, options) for chunk in batch]
    assert seen == list(range(first, first + count))
    for batch in batches(first, count, options):
        assert len(batch) <= options.chunks_at_once
        pieces = list(micro_batches(len(batch), options))
        assert pieces[0].begin == 0
        assert all(one.end == other.begin for one, other in pairwise(pieces))
        assert pieces[-1].end == options.n_ctx
        assert all(piece.n_tokens <= max(options.n_ubatch, piece.n_seq) for piece in pieces)
        assert max(piece.n_tokens for piece in pieces) <= largest(options)


def test_three_chunks_leave_a_rest_as_in_llama_cpp() -> None:
    pieces = list(micro_batches(3, CollectOptions()))
    assert [piece.end - piece.begin for piece in pieces] == [170, 170, 170, 2]


def test_a_long_context_is_cut_at_batches_too() -> None:
    options = CollectOptions(n_ctx=1000, n_batch=300, n_ubatch=200)
    assert [(piece.begin, piece.end) for piece in micro_batches(1, options)] == [
        *((0, 200), (200, 300), (300, 500), (500, 600)),
        *((600, 800), (800, 900), (900, 1000)),
    ]


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 150), st.integers(1, 40))


@given(shapes, st.integers(0, 1000))
def test_squares_are_those_of_float64(shape: tuple[int, int, int, int], seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    exact = np.square(values.astype(np.float64)).sum(axis=2)
    assert np.allclose(slice_squares(values), exact, rtol=4e-6, atol=0)
    strided = np.repeat(values, 2, axis=2)[:, :, ::2]  # rows that do not follow each other, as a view's
    assert np.allclose(slice_squares(strided), exact, rtol=4e-6, atol=0)


def test_a_matrix_meets_every_slice_that_wraps_around_to_it() -> None:
    squares = np.arange(12.0).reshape(2, 3, 2)
    assert np.array_equal(fold(squares, 1, 1), [[30.0, 36.0]])
    assert np.array_equal(fold(squares, 1, 3), [[6.0, 8.0], [10.0, 12.0], [14.0, 16.0]])
    assert np.array_equal(fold(squares, 2, 3), squares.reshape(6, 2))


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 4), st.booleans(), st.integers(0, 1000))
def test_experts_get_their_own_tokens(n_tokens: int, n_experts: int, n_used: int, shared: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    experts = draw.integers(0, n_experts, (n_tokens, n_used)).astype(np.int32)
    values = draw.standard_normal((n_tokens, 1 if shared else n_used, 8)).astype(np.float32)
    sums_, counts = expert_squares(values, experts, n_experts)
    expected, met = np.zeros((n_experts, 8)), np.zeros(n_experts, np.int64)
    for token in range(n_tokens):
        for slot in range(n_used):
            expected[experts[token, slot]] += values[token, slot % values.shape[1]].astype(np.float64) ** 2
            met[experts[token, slot]] += 1
    assert np.array_equal(counts, met)
    assert np.allclose(sums_, expected, rtol=4e-6, atol=1e-12)


def test_rounding_stays_small_over_many_rows() -> None:
    rows = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
    exact = np.square(rows.astype(np.float64)).sum(axis=0)
    assert np.abs(column_squares(rows) / exact - 1).max() < 5e-7


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_scores_are_those_of_a_float64_softmax(scale: float) -> None:
    draw = np.random.default_rng(1)
    logits = (scale * draw.standard_normal((70, 1000))).astype(np.float32)
    targets = draw.integers(0, 1000, 70).astype(np.int32)
    wide = logits.astype(np.float64)
    values = np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)) + wide.max(axis=1)
    values -= wide[np.arange(70), targets]
    nll, nll2 = score(logits, targets)
    assert nll == pytest.approx(values.sum(), rel=1e-6)
    assert nll2 == pytest.approx(np.square(values).sum(), rel=1e-6)


def test_perplexities_of_parts_join() -> None:
    whole = Perplexity(20.0, 60.0, 10) + Perplexity(10.0, 30.0, 10)
    assert whole.value == pytest.approx(math.exp(1.5))
    assert whole.error == pytest.approx(math.exp(1.5) * math.sqrt((4.5 - 2.25) / 19))
    assert Perplexity().value is None
    assert (whole + Perplexity(5.0, None, 5)).error is None


def test_an_unfinished_range_comes_back_bit_by_bit(tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    entries = {
        "blk.0.attn_q.weight": CollectedEntry(draw.random((1, 7)), np.array([1536])),
        "blk.0.ffn_up_exps.weight": CollectedEntry(draw.random((4, 5)), np.array([0, 3, 1 << 40, 9])),
    }
    work = sums_file.Range(8, entries, 1 / 3, 2 / 3, 2040, 12.5)
    path = tmp_path / "0.partial"
    sums_file.write(path, work, n_ctx=512, dataset="text", fingerprint="this")
    again = sums_file.resume(path, "this")
    assert (again.done, again.nll, again.nll2, again.scored, again.seconds) == (8, 1 / 3, 2 / 3, 2040, 12.5)
    for name, entry in entries.items():
        assert np.array_equal(again.entries[name].sums, entry.sums)
        assert np.array_equal(again.entries[name].counts, entry.counts)
    assert sums_file.resume(path, "that").done == 0
    assert sums_file.resume(tmp_path / "none", "this").done == 0
    whole = path.read_bytes()
    for cut in range(0, len(whole), 97):
        path.write_bytes(whole[:cut])
        assert sums_file.resume(path, "this").done == 0
