"""Ranges to measure: their sizes follow from model and options; scores arrive in any order and lie in that of the text."""

from __future__ import annotations

from contextlib import closing
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.files.logits import LogitsHead
from imatrix_runner.engines.files.token_scores import TOKEN, read_token_scores
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.measures import MeasuredRange
from imatrix_runner.errors import EngineError, InvalidDataError
from imatrix_runner.evaluate.disk_budget import DEFAULT_BYTES
from imatrix_runner.evaluate.measure_ranges import cut, divided, measured_chunks, missing_ranges
from imatrix_runner.evaluate.range_scores import RangeScoresFile, remove_waiting

OPTIONS = CollectOptions(n_ctx=16, n_batch=32)
RANGES = cut(7, 2)
ROWS = 7


def scores(chunks: ChunkRange) -> bytes:
    tokens = np.zeros((chunks.count, ROWS), TOKEN)
    tokens["nll"] = np.arange(chunks.first, chunks.end)[:, np.newaxis]
    return tokens.tobytes()


def opened(path: Path) -> RangeScoresFile:
    return RangeScoresFile(path, "print", OPTIONS, RANGES)


def chunks_in(path: Path) -> list[int]:
    return [int(chunk["nll"][0]) for chunk in read_token_scores(path, "print", OPTIONS.n_ctx)]


@pytest.mark.parametrize("n_ctx", [512, 4096])
@pytest.mark.parametrize(("n_params", "n_bytes"), [(10**6, 2 * 10**6), (150 * 10**6, 3 * 10**8), (3 * 10**9, 6 * 10**10)])
def test_a_range_has_whole_batches_and_pays_for_loading(n_params: int, n_bytes: int, n_ctx: int) -> None:
    options = CollectOptions(n_ctx=n_ctx)
    size = measured_chunks(n_params, n_bytes, 256, options, gpu=False)
    assert size >= 4
    assert size % options.chunks_at_once == 0
    computing = 2 * n_params * n_ctx * size / 2e11
    assert n_bytes / 1.5e9 <= 0.05 * computing
    assert measured_chunks(n_params, n_bytes, 256, options, gpu=True) >= size


def test_the_reference_of_a_range_fits_where_that_of_a_measurement_does() -> None:
    options = CollectOptions(n_ctx=512)
    fast = measured_chunks(8 * 10**9, 16 * 10**9, 150_000, options, gpu=True)
    assert 0.9 * DEFAULT_BYTES < LogitsHead(512, 150_000, fast).n_bytes <= DEFAULT_BYTES
    assert fast % options.chunks_at_once == 0
    assert measured_chunks(10**9, 10**9, 1 << 24, CollectOptions(n_ctx=8192), gpu=True) == 1


def test_the_last_range_ends_with_the_text() -> None:
    assert cut(7, 4) == (ChunkRange(0, 4), ChunkRange(4, 3))
    assert cut(4, 8) == (ChunkRange(0, 4),)


@pytest.mark.parametrize("order", list(permutations(RANGES)))
def test_scores_lie_in_the_order_of_the_text(order: tuple[ChunkRange, ...], tmp_path: Path) -> None:
    path = tmp_path / "x.scored"
    for chunks in order:  # opened anew each time, as after a kill
        with closing(opened(path)) as file:
            assert file.lacks(chunks)
            file.take(chunks, scores(chunks), 1.0)
            assert not file.lacks(chunks)
    assert chunks_in(path) == list(range(7))
    assert [each.name for each in tmp_path.iterdir()] == ["x.scored"]


def test_scores_after_a_part_of_a_range_are_added(tmp_path: Path) -> None:
    path, wide = tmp_path / "x.scored", cut(7, 4)
    with closing(opened(path)) as file:
        file.take(RANGES[0], scores(RANGES[0]), 1.0)
    with closing(RangeScoresFile(path, "print", OPTIONS, wide)) as file:
        assert [file.lacks(chunks) for chunks in wide] == [True, True]
        for chunks in reversed(wide):
            file.take(chunks, scores(chunks), 1.0)
    assert chunks_in(path) == list(range(7))


def test_the_first_error_in_the_order_of_the_text_counts(tmp_path: Path) -> None:
    first, later = EngineError("first", "", ""), EngineError("later", "", "")
    with closing(opened(tmp_path / "x.scored")) as file:
        file.take(RANGES[2], later, 1.0)
        file.take(RANGES[0], scores(RANGES[0]), 1.0)
        assert file.error is None
        file.take(RANGES[1], first, 1.0)
        assert file.error is first
        assert file.done == RANGES[0].end


def test_only_what_is_missing_is_measured(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "a")) as source, closing(opened(tmp_path / "b")) as level:
        for chunks in RANGES[1:]:
            source.take(chunks, scores(chunks), 1.0)
        level.take(RANGES[0], scores(RANGES[0]), 1.0)
        level.take(RANGES[3], scores(RANGES[3]), 1.0)
        found = missing_ranges(RANGES, source, [level])
    assert [(each.chunks, each.subjects) for each in found] == [(RANGES[0], ()), (RANGES[1], (0,)), (RANGES[2], (0,))]
    remove_waiting(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_an_incomplete_result_is_refused(tmp_path: Path) -> None:
    with closing(opened(tmp_path / "x")) as file, pytest.raises(InvalidDataError, match="are incomplete"):
        file.take(RANGES[0], scores(RANGES[0])[:-1], 1.0)


@pytest.mark.parametrize(
    ("workers", "shares"),
    [(1, 1), (2, 4), (64, 5)],
)
def test_one_range_is_divided_by_its_subjects(workers: int, shares: int) -> None:
    whole = MeasuredRange(RANGES[0], (0, 1, 2, 3, 4), (7, 8))
    found = divided([whole], workers)
    assert sorted(place for each in found for place in each.subjects) == [0, 1, 2, 3, 4]
    assert len(found) == shares
    assert all(each.chunks == RANGES[0] and each.order == (7, 8) for each in found)
    assert max(len(each.subjects) for each in found) - min(len(each.subjects) for each in found) <= 1


def test_many_ranges_and_those_of_the_source_alone_are_not_divided() -> None:
    many = [MeasuredRange(chunks, (0, 1)) for chunks in RANGES]
    assert divided(many, 2) == tuple(many)
    assert divided([MeasuredRange(RANGES[0], ())], 8) == (MeasuredRange(RANGES[0], ()),)
    assert divided([], 8) == ()
