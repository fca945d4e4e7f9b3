"""Which tensors go into which shard: llama-gguf-split's rules, and what the plan makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.shards import MEGABYTE, MOST_SHARDS, cut, shard_paths, tensors_per_shard
from imatrix_runner.errors import UsageError
from imatrix_runner.quantize.level_facts import uncut
from imatrix_runner.quantize.level_files import plan_shards, planned_files
from imatrix_runner.quantize.typed_options import parse_split_size

M = MEGABYTE
BY_SIZE = QuantizeOptions(split_max_size=2)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ([], (0,)),
        ([M], (1,)),
        ([M, M], (2,)),
        ([M, M, 1], (2, 1)),
        ([M - 31, M], (2,)),  # each is padded to 32 bytes: exactly 2 MB
        ([M + 1, M], (1, 1)),
        ([M, 5 * M, M], (1, 1, 1)),  # a tensor that is larger than the limit is alone
        ([M, 5 * M], (1, 1)),
        ([3 * M, M], (0, 1, 1)),  # the first shard would hold nothing, which llama-gguf-split refuses
    ],
)
def test_shards_by_size(sizes: list[int], counts: tuple[int, ...]) -> None:
    assert tensors_per_shard(sizes, BY_SIZE) == counts


@given(st.lists(st.integers(1, 4 * M), max_size=40), st.integers(1, 5))
def test_no_tensor_is_lost_and_no_shard_is_too_large(sizes: list[int], limit: int) -> None:
    counts = tensors_per_shard(sizes, QuantizeOptions(split_max_size=limit))
    shards = cut(sizes, counts)
    assert [size for shard in shards for size in shard] == sizes
    assert all(len(shard) == 1 or sum(-(-size // 32) * 32 for size in shard) <= limit * M for shard in shards if shard)


@given(st.integers(0, 60), st.integers(1, 20))
def test_shards_by_number(n_tensors: int, most: int) -> None:
    counts = tensors_per_shard([32] * n_tensors, QuantizeOptions(split_max_tensors=most))
    assert sum(counts) == n_tensors
    assert all(count == most for count in counts[:-1])
    assert counts[-1] <= most


def test_names_are_llama_cpp_s() -> None:
    paths = shard_paths(Path("/w/m.x-Q8_0.gguf"), 2)
    assert paths == (Path("/w/m.x-Q8_0-00001-of-00002.gguf"), Path("/w/m.x-Q8_0-00002-of-00002.gguf"))


def test_shards_have_a_folder_for_each_level_and_one_file_has_none() -> None:
    single = Path("/w/m-MIX-4.25bpw-IQ4_XS.gguf")
    first, _ = planned_files(single, BY_SIZE, 2, 1)
    assert first == Path("/w/m-MIX-4.25bpw-IQ4_XS/m-MIX-4.25bpw-IQ4_XS-00001-of-00002.gguf")
    assert planned_files(single, BY_SIZE, 0, 1) == (single,)
    assert planned_files(single, QuantizeOptions(keep_split=True), 0, 1) == shard_paths(single, 1)


class TestPlan:
    def test_a_level_that_fits_is_not_cut(self) -> None:
        assert plan_shards(["a", "b"], [M, M], BY_SIZE) == ((), [])
        assert plan_shards(["a"], [9 * M], QuantizeOptions()) == ((), [])

    def test_a_first_tensor_that_does_not_fit(self) -> None:
        counts, (failure,) = plan_shards(["output.weight", "b"], [3 * M + 1, M], BY_SIZE)
        assert counts == ()
        assert "output.weight, takes 3,000,001 bytes" in failure.why
        assert "--split-max-size 4M" in failure.todo

    def test_the_size_that_is_advised_is_enough(self) -> None:
        for size in (M, M + 1, 2 * M - 1, 2 * M):
            _, failures = plan_shards(["a", "b"], [size, size], QuantizeOptions(split_max_size=1))
            advised = int(failures[0].todo.split()[-1].removesuffix("M.")) if failures else 1
            assert tensors_per_shard([size, size], QuantizeOptions(split_max_size=advised))[0] > 0

    def test_an_unknown_size(self) -> None:
        _, (failure,) = plan_shards(["a", "b"], [M, None], BY_SIZE)
        assert "the size of b" in failure.why

    def test_more_shards_than_can_be_numbered(self) -> None:
        n_tensors = MOST_SHARDS + 1
        _, (failure,) = plan_shards(["a"] * n_tensors, [32] * n_tensors, QuantizeOptions(split_max_tensors=1))
        assert f"{n_tensors} shards" in failure.why


@pytest.mark.parametrize(("text", "megabytes"), [("1M", 1), ("48G", 48_000), ("1500M", 1500), ("0048M", 48)])
def test_sizes(text: str, megabytes: int) -> None:
    assert parse_split_size(text) == megabytes


@pytest.mark.parametrize("text", ["0", "0M", "-1M", "x", "M", "1.5G", "48", "48GB", "48g", "1 M", "48GiB", "9999999G", "١M"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--split-max-size") as caught:
        parse_split_size(text)
    assert "10^6 bytes" in caught.value.why
    assert "--split-max-size 48G" in caught.value.todo


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("Q4_K_M", "Q4_K_M"),
        ("Q4_K_M --split-max-size 48000M", "Q4_K_M"),
        ("Q4_K_M --pure --split-max-tensors 9 --tensor-type-file sha256:1", "Q4_K_M --pure --tensor-type-file sha256:1"),
    ],
)
def test_how_a_level_is_cut_is_left_out_of_its_options(options: str, expected: str) -> None:
    assert uncut(options) == expected
