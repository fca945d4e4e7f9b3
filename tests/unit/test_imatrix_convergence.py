"""The measure of convergence against synthetic text whose truth is known, and the rules that stop or go on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.imatrix.convergence import Point, converged, distance, estimate, point, shares, uncovered
from imatrix_runner.imatrix.matrix import MatrixEntry
from support.values import entry, matrix

COLUMNS = 2000


class Source:
    """Endless independent chunks: every column's sum is gamma distributed around its own mean."""

    def __init__(self, seed: int, *, shape: float = 0.5, scale: float = 1.0) -> None:
        self._random = np.random.default_rng(seed)
        self.means = self._random.lognormal(0, 1, COLUMNS) * scale
        self._shape = shape

    def chunks(self, count: int) -> MatrixEntry:
        sums = self._random.gamma(self._shape * count, self.means / self._shape)
        return MatrixEntry(sums[None, :], np.array([64 * count], np.int64))

    def truth(self) -> MatrixEntry:
        return MatrixEntry(self.means[None, :], np.array([64], np.int64))


def plus(one: MatrixEntry, other: MatrixEntry) -> MatrixEntry:
    return MatrixEntry(one.sums + other.sums, one.counts + other.counts)


@pytest.mark.parametrize(("before", "newest"), [(12, 12), (48, 12), (96, 12), (36, 4), (10, 1), (4, 40)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_the_estimate_is_the_distance_from_the_truth(before: int, newest: int, scale: float) -> None:
    """For independent chunks, however many are new: 2000 columns leave little to luck."""
    source = Source(before * 100 + newest, scale=scale)
    old = source.chunks(before)
    new = plus(old, source.chunks(newest))
    guessed = estimate(old, new, before + newest, newest)
    assert guessed == pytest.approx(distance(source.truth(), new), rel=0.2)


def test_twice_the_text_moves_it_by_less_than_the_estimate() -> None:
    """By 1/√2 of it: the truth is further away than where one gets with as much again."""
    source = Source(1)
    old = source.chunks(36)
    new = plus(old, source.chunks(12))
    double = plus(new, source.chunks(48))
    assert distance(new, double) == pytest.approx(estimate(old, new, 48, 12) / math.sqrt(2), rel=0.1)


def test_it_falls_with_the_square_root_of_the_text() -> None:
    source = Source(2)
    state, found = source.chunks(12), dict[int, float]()
    for chunks in range(24, 1201, 12):
        before, state = state, plus(state, source.chunks(12))
        found[chunks] = estimate(before, state, chunks, 12)
    for chunks in (48, 120, 300):
        assert found[chunks] / found[4 * chunks] == pytest.approx(2, rel=0.2)


REAL = st.floats(0, 1e30, allow_subnormal=False)


@st.composite
def states(draw: st.DrawFn) -> tuple[MatrixEntry, MatrixEntry]:
    """An entry, and what it became."""
    n_mat, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    rows = st.lists(st.lists(REAL, min_size=columns, max_size=columns), min_size=n_mat, max_size=n_mat)
    counts = st.lists(st.integers(0, 1000), min_size=n_mat, max_size=n_mat)
    before = entry(draw(rows), draw(counts))
    return before, plus(before, entry(draw(rows), draw(counts)))


@given(states())
def test_a_distance_is_a_share(states: tuple[MatrixEntry, MatrixEntry]) -> None:
    before, after = states
    assert 0 <= distance(before, after) <= 1 + 1e-9
    assert distance(after, after) == 0
    np.testing.assert_allclose(shares(after.sums).sum(axis=1), 1)


@given(states(), st.floats(1e-3, 1e3))
def test_a_tensors_scale_does_not_matter(states: tuple[MatrixEntry, MatrixEntry], factor: float) -> None:
    before, after = states
    scaled = MatrixEntry(after.sums * factor, after.counts)
    assert distance(before, scaled) == pytest.approx(distance(before, after), abs=1e-9)


def test_distances_by_example() -> None:
    half = entry([1, 1], 10)
    assert distance(half, entry([2, 0], 20)) == 0.5
    assert distance(entry([0, 0], 0), half) == 0  # without data all columns mattered alike
    assert distance(entry([1, 0], 10), entry([0, 1], 10)) == 1
    # Experts count as their tokens: 30 of 40 moved by a half, the others not at all.
    assert distance(entry([[1, 1], [1, 1]], [5, 5]), entry([[2, 0], [3, 3]], [30, 10])) == pytest.approx(0.375)
    assert distance(entry([[1, 1], [0, 0]], [5, 0]), entry([[1, 1], [0, 0]], [5, 0])) == 0


def test_a_point_names_the_worst_tensor() -> None:
    assert point(24, []) is None
    errors = [("blk.0.attn_q.weight", 0.1), ("blk.1.ffn_down.weight", 0.4), ("blk.0.ffn_up.weight", 0.2)]
    assert point(24, errors) == Point(24, 0.4, "blk.1.ffn_down", 0.2)


def curve(*worst: float) -> list[Point]:
    return [Point(12 * index, value, "blk.0.attn_q", value / 2) for index, value in enumerate(worst, start=2)]


@pytest.mark.parametrize(
    ("worst", "chunks"),
    [
        ((), None),
        ((0.01,), None),  # one point may be luck
        ((0.01, 0.01), 36),
        ((0.02, 0.02), 36),  # the tolerance itself is enough
        ((0.01, 0.03, 0.01, 0.03), None),
        ((0.05, 0.01, 0.019), 48),
        ((0.01, 0.01, 0.5, 0.5), 36),  # what was decided once stays so
        ((math.nan, math.nan), None),
    ],
)
def test_it_has_converged_at_the_second_good_point_in_a_row(worst: tuple[float, ...], chunks: int | None) -> None:
    assert converged(curve(*worst), 0.02) == chunks


def test_experts_that_saw_too_little_are_named() -> None:
    entries = {
        "blk.0.attn_q.weight": entry([1, 2], 3),
        "blk.0.ffn_down_exps.weight": entry([[1, 2]] * 4, [10, 0, 3, 10]),
        "blk.1.ffn_down_exps.weight": entry([[1, 2]] * 4, [10, 10, 10, 9]),
        "blk.2.ffn_down_exps.weight": entry([[1, 2]] * 8, [0] * 8),
    }
    told = [item.describe() for item in uncovered(matrix(entries), 10)]
    assert told == [
        "blk.0.ffn_down_exps: experts 1, 2 of 4 saw 0 and 3 tokens",
        "blk.1.ffn_down_exps: expert 3 of 4 saw 9 tokens",
        "blk.2.ffn_down_exps: experts 0, 1, 2, 3, 4, 5, … of 8 saw 0, 0, 0, 0, 0, 0, … tokens",
    ]
    assert uncovered(matrix(entries), 0) == []
