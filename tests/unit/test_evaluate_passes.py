"""A measurement never takes more of the disk than was said, and every chunk is compared once, whatever there is room for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from imatrix_runner.engines.files.logits import LogitsHead
from imatrix_runner.errors import NoSpaceError
from imatrix_runner.evaluate.disk_budget import DEFAULT_BYTES, Extent, disk_limit, fit, next_range, waves

GIB = 1 << 30
LLAMA = Extent(n_vocab=32_000, n_ctx=512, n_chunks=100, at_once=4, n_levels=8)

extents = st.builds(
    Extent,
    n_vocab=st.integers(1, 300_000),
    n_ctx=st.integers(16, 8192),
    n_chunks=st.integers(1, 300),
    at_once=st.integers(1, 64),
    n_levels=st.integers(1, 30),
    given=st.booleans(),
    further_bytes=st.integers(0, 10_000_000),
)
baseline_sizes = st.lists(st.integers(1, 20 * GIB), max_size=6)


def scarce(data: st.DataObject, extent: Extent, baselines: list[int]) -> int:
    """A limit somewhere between too little and plenty."""
    least = extent.kept_bytes + extent.further_bytes + max(baselines, default=0)
    return data.draw(st.integers(max(0, least - 10), least + extent.reference_bytes(extent.n_chunks) + sum(baselines) + 10))


def test_the_reference_takes_as_much_as_its_file_does() -> None:
    assert 0 < LLAMA.reference_bytes(100) - LogitsHead(512, 32_000, 100).n_bytes < 5000
    assert replace(LLAMA, given=True).reference_bytes(100) == 0
    assert LLAMA.n_tokens == 100 * 255
    assert LLAMA.kept_bytes == 9 * (32 + 100 * (255 * 24 + 4))  # eight levels and the source


@given(st.data(), extents, baseline_sizes, st.booleans())
def test_it_never_takes_more_than_it_may_and_says_how_much(
    data: st.DataObject, extent: Extent, baselines: list[int], whole: bool
) -> None:
    limit = scarce(data, extent, baselines)
    least = 1 if whole else min(extent.at_once, extent.n_chunks)
    if taken(extent, least) + max(baselines, default=0) > limit:
        with pytest.raises(NoSpaceError):
            fit(extent, limit, baselines, whole=whole)
        return
    found = fit(extent, limit, baselines, whole=whole)
    sizes = {str(number): size for number, size in enumerate(baselines)}
    at_most_baselines = max((sum(sizes[name] for name in wave) for wave in waves(sizes, found.room)), default=0)
    assert taken(extent, found.chunks) + at_most_baselines <= found.n_bytes <= limit
    assert least <= found.chunks <= extent.n_chunks
    assert found.n_passes == (1 if whole else -(-extent.n_chunks // found.chunks))


@given(st.data(), extents)
def test_no_pass_is_smaller_than_it_must_be(data: st.DataObject, extent: Extent) -> None:
    """Another batch would not fit; a pass costs a computation of the source."""
    limit = scarce(data, extent, [])
    try:
        found = fit(extent, limit)
    except NoSpaceError:
        return
    more = found.chunks + extent.at_once
    assert found.chunks == extent.n_chunks or taken(extent, more) > limit


def taken(extent: Extent, chunks: int) -> int:
    return extent.kept_bytes + extent.further_bytes + extent.reference_bytes(chunks)


@given(st.data(), extents, st.lists(st.integers(0, 300), min_size=1, max_size=5))
def test_every_chunk_of_every_level_is_compared_once_in_whole_batches(
    data: st.DataObject, extent: Extent, done: list[int]
) -> None:
    """From wherever each level stands, a batch that was torn included."""
    assume(max(done) <= extent.n_chunks)
    try:
        at_a_time = fit(extent, scarce(data, extent, [])).chunks
    except NoSpaceError:
        return
    references = []
    while (chunks := next_range(done, extent, at_a_time)) is not None:
        references.append(chunks)
        assert chunks.first <= min(done)  # nobody misses a chunk
        assert chunks.first % extent.at_once == 0
        assert 0 < chunks.count <= at_a_time
        assert chunks.end <= extent.n_chunks
        assert chunks.end % extent.at_once == 0 or chunks.end == extent.n_chunks
        done = [max(each, chunks.end) for each in done]
    assert min(done) == extent.n_chunks
    assert all(one.end == other.first for one, other in pairwise(references))


def test_nothing_is_referred_to_where_everything_is_known() -> None:
    assert next_range([], LLAMA, 100) is None
    assert next_range([100, 250], LLAMA, 100) is None


def test_a_level_that_lags_behind_has_the_reference_begin_where_it_stands() -> None:
    chunks = next_range([100, 22], LLAMA, 100)
    assert chunks is not None
    assert (chunks.first, chunks.count) == (20, 80)


def test_a_program_that_cannot_continue_measures_fewer_chunks_in_one_pass() -> None:
    limit = LLAMA.kept_bytes + LLAMA.reference_bytes(37)
    assert (fit(LLAMA, limit, whole=True).chunks, fit(LLAMA, limit, whole=True).n_passes) == (37, 1)
    assert (fit(LLAMA, limit).chunks, fit(LLAMA, limit).n_passes) == (36, 3)


def test_what_does_not_fit_is_refused_with_what_it_would_take() -> None:
    with pytest.raises(NoSpaceError) as caught:
        fit(LLAMA, 50 << 20, [700 << 20])
    assert caught.value.why.startswith("4 chunks of 512 tokens take 7")
    assert "with the largest baseline of 700.00 MiB, and 50.00 MiB may be used" in caught.value.why
    assert "--max-disk" in caught.value.todo


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 100), max_size=12), st.integers(0, 200))
def test_baselines_come_in_their_order_as_many_at_a_time_as_fit(sizes: dict[str, int], room: int) -> None:
    found = waves(sizes, room)
    assert [name for wave in found for name in wave] == list(sizes)
    assert all(len(wave) == 1 or sum(sizes[name] for name in wave) <= room for wave in found)
    for wave, following in pairwise(found):  # whose first would not have fitted too
        assert sum(sizes[name] for name in [*wave, following[0]]) > room


@pytest.mark.parametrize(
    ("asked", "free", "limit"),
    [(None, 100 * GIB, DEFAULT_BYTES), (None, 5 * GIB, 4 * GIB), (20 * GIB, 100 * GIB, 20 * GIB), (20 * GIB, 5 * GIB, 4 * GIB)],
)
def test_a_fifth_of_what_is_free_stays_free(asked: int | None, free: int, limit: int) -> None:
    assert disk_limit(asked, free) == limit
