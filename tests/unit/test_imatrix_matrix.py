"""The importance matrix as a value: what adds up, what is unusable, what belongs to another model."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.imatrix.matrix import Matrix, add, as_collected, misfits, problems
from support.values import entry, matrix, same_matrix

QUERY = "blk.0.attn_q.weight"


def test_sums_and_counts_add_by_name() -> None:
    one = matrix({"a": entry([1, 2], 64), "b": entry([[1], [2]], [3, 0])}, datasets=("x",))
    two = matrix({"b": entry([[10], [20]], [1, 7]), "c": entry([5], 64)}, datasets=("y", "x"), chunk_count=3)
    expected = {"a": entry([1, 2], 64), "b": entry([[11], [22]], [4, 7]), "c": entry([5], 64)}
    assert same_matrix(add([one, two]), matrix(expected, datasets=("x", "y"), chunk_count=5))


def test_adding_is_exact_where_float32_would_stand_still() -> None:
    big, small = matrix({"a": entry([2.0**30], 1)}), matrix({"a": entry([1.0], 1)})
    assert add([big, *[small] * 5]).entries["a"].sums[0, 0] == 2.0**30 + 5


def test_the_parts_stay_as_they_were() -> None:
    one, two = matrix({"a": entry([1], 1)}), matrix({"a": entry([2], 1)})
    total = add([one, two])
    total.entries["a"].sums[:] = 99
    assert (one.entries["a"].sums[0, 0], two.entries["a"].sums[0, 0]) == (1, 2)


WHOLE = st.integers(0, 1 << 40)
ROWS = st.lists(WHOLE, min_size=3, max_size=3)
MATRICES = st.dictionaries(st.sampled_from("abcd"), st.tuples(ROWS, WHOLE), min_size=1).map(
    lambda entries: matrix({name: entry(sums, count) for name, (sums, count) in entries.items()})
)


@given(st.lists(MATRICES, min_size=1, max_size=5), st.data())
def test_ranges_may_be_summed_step_by_step(parts: list[Matrix], data: st.DataObject) -> None:
    """A collection that was interrupted anywhere ends with the same numbers."""
    at = data.draw(st.integers(1, len(parts)))
    assert same_matrix(add([add(parts[:at]), *parts[at:]]), add(parts))


def test_another_chunk_size_is_refused() -> None:
    with pytest.raises(InvalidDataError, match="chunks of 64 and of 512 tokens"):
        add([matrix(), matrix(chunk_size=512)])


@pytest.mark.parametrize("other", [entry([1, 2, 3], 1), entry([[1, 2], [3, 4], [5, 6]], [1, 1, 1])])
def test_another_shape_is_refused(other: object) -> None:
    with pytest.raises(InvalidDataError, match=QUERY):
        add([matrix(), matrix({QUERY: other})])  # type: ignore[dict-item]


def test_a_good_matrix_has_no_problems() -> None:
    assert problems(matrix({"a": entry([0, 1], 0), "b": entry([[1], [2]], [0, 5])})) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_named(bad: float) -> None:
    assert problems(matrix({"good": entry([1], 1), "bad": entry([1, bad], 1)})) == ["bad holds NaN or infinite values"]


@pytest.mark.parametrize(("sums", "count"), [([-1.0], 1), ([1.0], -1)])
def test_negative_numbers_are_named(sums: list[float], count: int) -> None:
    assert problems(matrix({"bad": entry(sums, count)})) == ["bad holds negative values"]


def test_an_empty_matrix_is_a_problem() -> None:
    assert problems(Matrix({}, 64, 0, ())) == ["it has no entries"]


@pytest.mark.parametrize(
    ("shape", "sums"),
    [
        ((4, 9), [1, 2, 3, 4]),
        ((4,), [1, 2, 3, 4]),
        ((2, 9, 2), [[1, 2], [3, 4]]),  # experts: a row of ne0 for each of ne2
        ((4, 3, 1, 5), [1, 2, 3, 4]),
    ],
)
def test_a_matrix_fits_weights_of_ne0_times_ne2(shape: tuple[int, ...], sums: list[float]) -> None:
    rows = entry(sums, [1] * np.atleast_2d(sums).shape[0])
    assert misfits(matrix({QUERY: rows}), {QUERY: shape, "output.weight": (8, 8)}) == []


def test_a_misfit_is_named_with_both_numbers() -> None:
    assert misfits(matrix(), {QUERY: (5, 4)}) == [f"{QUERY} has 4 values where the model needs 5"]


def test_a_matrix_without_any_common_name_is_of_another_model() -> None:
    assert misfits(matrix(), {"blk.0.other.weight": (4, 4)}) == ["none of its entries names a tensor of this model"]


@pytest.mark.parametrize("name", ["token_embd.weight", "per_layer_token_embd.weight"])
def test_embeddings_may_misfit_because_llama_quantize_ignores_them(name: str) -> None:
    good = {QUERY: entry([1, 2, 3, 4], 1), name: entry([1], 1)}
    assert misfits(matrix(good), {QUERY: (4, 4), name: (4, 4)}) == []


def test_calls_of_a_legacy_matrix_become_tokens_and_its_means_stay() -> None:
    """Four calls for two chunks (a batch holds half of one); a weight used twice in the graph has eight."""
    legacy = matrix({"a": entry([4, 8], 4), "b": entry([40], 4), "twice": entry([8], 8)}, chunk_size=0, chunk_count=8)
    found = as_collected(legacy, 2, 64)
    assert (found.chunk_size, found.chunk_count, found.datasets) == (64, 2, legacy.datasets)
    assert {name: found.counts(name).tolist() for name in found.entries} == {"a": [128], "b": [128], "twice": [256]}
    for name in legacy.entries:
        before, after = legacy.entries[name], found.entries[name]
        np.testing.assert_array_equal(after.sums / after.counts[0], before.sums / before.counts[0])


def test_a_matrix_that_counts_tokens_is_left_as_it_is() -> None:
    counted = matrix()
    assert as_collected(counted, 2, 64) is counted
