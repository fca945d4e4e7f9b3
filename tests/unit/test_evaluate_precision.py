"""When a measurement ends: possible ends follow from the text alone, and tokens of a chunk count as one sample."""

from __future__ import annotations

import numpy as np
import pytest

from imatrix_runner.evaluate.precision import (
    LEAST_CHUNKS,
    is_precise,
    possible_ends,
    precise_after,
    relative_error,
    spread_chunks,
)

ROWS = 31


def divergences(
    n_chunks: int, *, within: float, between: float, seed: int = 0
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Log-normal divergences, whose level differs from chunk to chunk."""
    draw = np.random.default_rng(seed)
    return np.exp(draw.normal(0, within, (n_chunks, ROWS)) + draw.normal(0, between, (n_chunks, 1)))


@pytest.mark.parametrize(("n_chunks", "at_once"), [(1, 4), (3, 4), (14, 4), (40, 4), (41, 1), (7, 8)])
def test_batches_are_spread_whole_and_a_cut_one_is_last(n_chunks: int, at_once: int) -> None:
    order = spread_chunks(n_chunks, at_once)
    assert sorted(order) == list(range(n_chunks))
    whole = n_chunks // at_once * at_once
    for first in range(0, whole, at_once):
        batch = order[first : first + at_once]
        assert (batch[0] % at_once, list(batch)) == (0, list(range(batch[0], batch[0] + at_once)))
    assert list(order[whole:]) == list(range(whole, n_chunks))


def test_possible_ends_are_whole_batches_and_end_with_the_text() -> None:
    assert list(possible_ends(50, 4)) == [8, 12, 16, 20, 28, 36, 48, 50]
    assert list(possible_ends(5, 4)) == [5]
    assert list(possible_ends(10, 1)) == [8, 10]
    assert len(list(possible_ends(10_000, 4))) < 40


def test_the_error_is_the_larger_of_that_over_tokens_and_that_over_chunks() -> None:
    alike = divergences(64, within=1.0, between=0.0)
    assert relative_error(alike) == pytest.approx(alike.std(ddof=1) / alike.mean() / np.sqrt(alike.size), rel=0.3)
    apart = divergences(64, within=0.1, between=1.0)
    assert relative_error(apart) > 4 * apart.std(ddof=1) / apart.mean() / np.sqrt(apart.size)
    assert relative_error(alike[:1]) == np.inf
    assert relative_error(np.zeros((8, ROWS))) == 0  # a source against itself


def test_few_chunks_are_never_precise() -> None:
    same = np.full((LEAST_CHUNKS, ROWS), 0.5)
    assert is_precise(same, 0.01)
    assert not is_precise(same[:-1], 0.01)


def test_the_end_does_not_depend_on_how_much_is_known() -> None:
    kld = divergences(200, within=1.0, between=0.3)
    end = precise_after(kld, 0.05, 200, 4)
    assert end is not None
    assert 8 < end < 200
    assert all(precise_after(kld[:known], 0.05, 200, 4) == (end if known >= end else None) for known in range(0, 200, 4))
    assert precise_after(kld, 0.01, 200, 4) == 200  # the text ends first
    finer = precise_after(kld, 0.04, 200, 4)
    assert finer is not None
    assert finer >= end
