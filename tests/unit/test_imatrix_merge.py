"""Merging and converting as values: exact sums, refused strangers, and plain words for what is lost or assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.imatrix.formats import MatrixFile, read, write
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry, held
from imatrix_runner.imatrix.merge import Made, convert, merge, parse_weights
from imatrix_runner.imatrix.stored_entries import StoredEntries
from support.values import entry, matrix, same_matrix

QUERY, EXPERTS = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"


def gguf(value: Matrix, name: str = "a.gguf") -> MatrixFile:
    return MatrixFile(Path(name), "gguf", value)


def legacy(entries: dict[str, MatrixEntry], name: str = "old.dat", chunks: int = 5, dataset: str = "old.txt") -> MatrixFile:
    """As :func:`read` gives it: the chunk size unknown, counts in chunks."""
    return MatrixFile(Path(name), "dat", Matrix(entries, 0, chunks, (dataset,)))


def merged(*values: Matrix, weights: Sequence[int] | None = None) -> Matrix:
    return held(merge([gguf(value, f"{number}.gguf") for number, value in enumerate(values)], weights).matrix)


def refusal(*files: MatrixFile) -> InvalidDataError:
    with pytest.raises(InvalidDataError) as caught:
        merge(files)
    return caught.value


WHOLE = st.integers(0, 1 << 40)
ROWS = st.lists(WHOLE, min_size=3, max_size=3)
REAL_ROWS = st.lists(st.floats(0, float(np.finfo(np.float32).max), width=32), min_size=3, max_size=3)


def matrices(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Matrix]]:
    """Matrices of one model: every one has the query, some have more."""
    more = st.dictionaries(st.sampled_from([f"blk.{number}.ffn_up.weight" for number in range(3)]), st.tuples(rows, WHOLE))
    one = st.tuples(st.tuples(rows, WHOLE), more).map(
        lambda drawn: matrix({name: entry(*pair) for name, pair in sorted({**drawn[1], QUERY: drawn[0]}.items())})
    )
    same_layers = st.lists(one, min_size=1, max_size=4).map(
        lambda parts: [matrix({name: e for name, e in p.entries.items() if name.startswith("blk.0.")}) for p in parts]
    )
    return st.one_of(same_layers, st.tuples(one, st.integers(1, 4)).map(lambda drawn: [drawn[0]] * drawn[1]))


class TestSums:
    """The arithmetic, against Python's own whole numbers."""

    @given(matrices(ROWS), st.data())
    def test_merging_is_exact(self, parts: list[Matrix], data: st.DataObject) -> None:
        weights = data.draw(st.lists(st.integers(1, 1000), min_size=len(parts), max_size=len(parts)))
        total = merged(*parts, weights=weights)
        for name, found in total.entries.items():
            having = [(part.entries[name], weight) for part, weight in zip(parts, weights, strict=True) if name in part.entries]
            sums = [sum(weight * int(part.sums[0, column]) for part, weight in having) for column in range(3)]
            assert found.sums[0].tolist() == sums
            assert found.counts.tolist() == [sum(weight * int(part.counts[0]) for part, weight in having)]

    @given(matrices(REAL_ROWS), st.data())
    def test_how_files_are_grouped_matters_only_in_the_last_digit(self, parts: list[Matrix], data: st.DataObject) -> None:
        at = data.draw(st.integers(1, len(parts)))
        at_once, step_by_step = merged(*parts), merged(merged(*parts[:at]), *parts[at:])
        assert list(at_once.entries) == list(step_by_step.entries)
        for name, found in at_once.entries.items():
            np.testing.assert_allclose(found.sums, step_by_step.entries[name].sums, rtol=1e-15)
            assert found.counts.tolist() == step_by_step.entries[name].counts.tolist()

    @given(matrices(REAL_ROWS).filter(lambda parts: len(parts) > 1))
    def test_a_weight_of_two_is_the_file_twice(self, parts: list[Matrix]) -> None:
        one, other = parts[:2]
        assert same_matrix(merged(one, other, weights=[2, 1]), merged(one, one, other))

    def test_chunks_are_those_of_the_fullest_entry(self) -> None:
        torn = matrix({QUERY: entry([1], 320), "blk.0.ffn_up.weight": entry([1], 256)}, chunk_count=5)
        assert merged(torn, matrix({QUERY: entry([1], 64)})).chunk_count == 6

    def test_one_file_alone_stays_as_it_is(self) -> None:
        assert same_matrix(merged(matrix()), matrix())

    def test_nothing_is_read_before_it_is_used(self, tmp_path: Path) -> None:
        """A merge of gigabytes is lazy: an entry made twice is two arrays."""
        write(matrix(), tmp_path / "a.gguf", "gguf")
        total = merge([read(tmp_path / "a.gguf")] * 2).matrix
        assert total.entries[QUERY].sums is not total.entries[QUERY].sums
        assert total.entries[QUERY].sums.tolist() == [[2, 4, 6, 8]]

    def test_each_file_s_entry_is_read_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Asking for names, shapes and counts, and merging, reads nothing; writing reads every entry of every file once."""
        reads: list[str] = []
        read_entry = StoredEntries.__getitem__

        def counted(self: StoredEntries, name: str) -> MatrixEntry:
            reads.append(name)
            return read_entry(self, name)

        monkeypatch.setattr(StoredEntries, "__getitem__", counted)
        files = []
        for number, kind in enumerate(("gguf", "dat", "gguf")):
            write(matrix(), tmp_path / str(number), kind)  # type: ignore[arg-type]
            files.append(read(tmp_path / str(number)))
        total = merge(files).matrix
        assert QUERY in total.entries
        assert "nothing" not in total.entries
        assert reads == []
        write(total, tmp_path / "out", "gguf")
        assert reads == [QUERY] * 3


class TestLegacy:
    """Counts in chunks join counts in tokens."""

    def test_a_legacy_file_takes_the_chunk_size_of_the_others(self) -> None:
        made = merge([legacy({QUERY: entry([1, 2, 3, 4], 2)}), gguf(matrix())])
        total = made.matrix.entries[QUERY]
        assert (total.sums.tolist(), total.counts.tolist()) == ([[65, 130, 195, 260]], [256])
        assert (made.matrix.chunk_size, made.matrix.chunk_count) == (64, 4)
        assert made.remarks == ("old.dat (legacy) counted in chunks of 64 tokens, as in the others",)

    def test_legacy_files_alone_are_assumed_to_have_the_default_chunks(self) -> None:
        made = merge([legacy({QUERY: entry([3], 2)}), legacy({QUERY: entry([5], 1)}, "new.dat", dataset="new.txt")])
        assert made.matrix.entries[QUERY].sums.tolist() == [[8 * 512]]
        assert (made.matrix.counts(QUERY).tolist(), made.matrix.chunk_size, made.matrix.chunk_count) == ([1536], 512, 3)
        (remark,) = made.remarks
        assert remark == "old.dat, new.dat (legacy) counted in chunks of 512 tokens, assumed, llama-imatrix's default"

    @pytest.mark.parametrize("first", [True, False])
    def test_the_single_count_of_a_legacy_mixture_counts_for_each_expert(self, first: bool) -> None:
        old = legacy({EXPERTS: entry([1, 2, 3, 4], 2)})
        new = gguf(matrix({EXPERTS: entry([[10, 20], [30, 40]], [100, 0])}))
        total = merge([old, new] if first else [new, old]).matrix.entries[EXPERTS]
        assert total.sums.tolist() == [[64 + 10, 128 + 20], [192 + 30, 256 + 40]]
        assert total.counts.tolist() == [228, 128]

    def test_three_files_of_which_two_disagree_on_the_experts_are_refused(self) -> None:
        files = [legacy({EXPERTS: entry([1, 2, 3, 4], 2)})]
        files += [gguf(matrix({EXPERTS: entry(np.ones((rows, 4 // rows)), [1] * rows)}), f"{rows}.gguf") for rows in (2, 4)]  # type: ignore[arg-type]
        assert EXPERTS in refusal(*files).why


class TestRefusals:
    """Matrices of different models."""

    def test_no_tensor_in_common(self) -> None:
        error = refusal(gguf(matrix()), gguf(matrix({"blk.0.ssm_in.weight": entry([1], 1)}), "b.gguf"))
        assert (error.what, error.why) == (
            "a.gguf and b.gguf are not of the same model",
            "they have no tensor in common",
        )

    def test_other_sizes(self) -> None:
        error = refusal(gguf(matrix()), gguf(matrix({QUERY: entry([1, 2], 1)}), "b.gguf"))
        assert error.why == f"{QUERY} has 4 values in one and 2 in the other"

    def test_other_layers(self) -> None:
        sums = entry([1, 2, 3, 4], 1)
        one = matrix({"blk.0.attn_q.weight": sums, "blk.1.attn_q.weight": sums})
        other = matrix({"blk.0.attn_q.weight": sums, "blk.2.attn_q.weight": sums})
        assert refusal(gguf(one), gguf(other, "b.gguf")).why == "their layers differ"

    def test_another_number_of_experts_with_as_many_values(self) -> None:
        one, other = (matrix({EXPERTS: entry(np.ones((rows, 8 // rows)), [1] * rows)}) for rows in (2, 4))  # type: ignore[arg-type]
        assert "(2, 4) values in one and (4, 2) in another" in refusal(gguf(one), gguf(other, "b.gguf")).why

    def test_the_third_file_is_compared_too(self) -> None:
        assert refusal(gguf(matrix()), gguf(matrix()), gguf(matrix({QUERY: entry([1], 1)}), "c.gguf")).what.startswith("a.gguf")

    def test_counts_that_no_number_can_hold(self) -> None:
        huge = gguf(matrix({QUERY: entry([1, 2, 3, 4], 1 << 53)}))
        with pytest.raises(InvalidDataError, match="counts add up to more than 64 bits"):
            merge([huge, huge], [1000, 1000])


class TestRemarks:
    """What is done all the same, and said."""

    def test_other_chunk_sizes(self) -> None:
        made = merge([gguf(matrix()), gguf(matrix(chunk_size=512, datasets=("b",)), "b.gguf")])
        assert made.remarks == ("the chunk sizes differ (64, 512); the result says 64",)
        assert made.matrix.entries[QUERY].counts.tolist() == [256]
        assert (made.matrix.chunk_size, made.matrix.chunk_count) == (64, 4)

    def test_the_same_text_twice(self) -> None:
        made = merge([gguf(matrix()), gguf(matrix(datasets=("text.txt", "b.txt")), "b.gguf")])
        assert made.remarks == ("the same dataset counts more than once: text.txt",)
        assert made.matrix.datasets == ("text.txt", "b.txt")

    def test_texts_without_a_name_are_not_the_same(self) -> None:
        assert merge([gguf(matrix(datasets=("",))), gguf(matrix(datasets=("",)), "b.gguf")]).remarks == ()

    def test_entries_that_one_file_lacks(self) -> None:
        whole = matrix({QUERY: entry([1], 64), "blk.1.attn_q.weight": entry([7], 64)}, datasets=("b",))
        made = merge([gguf(matrix({QUERY: entry([1], 64)})), gguf(whole, "b.gguf")])
        assert made.remarks == ("a.gguf lacks 1 of the 2 entries; there the others count alone",)
        assert made.matrix.entries["blk.1.attn_q.weight"].sums.tolist() == [[7]]


class TestWeights:
    """``--weight``."""

    @pytest.mark.parametrize(
        ("text", "whole"),
        [("2,1", [2, 1]), ("0.7,0.3", [7, 3]), (" 1 , 0.5 ", [2, 1]), ("1/3,2/3", [1, 2]), ("1000,1", [1000, 1])],
    )
    def test_proportions_become_whole_numbers(self, text: str, whole: list[int]) -> None:
        assert parse_weights(text, 2) == whole

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(1, 30))
    def test_any_fractions_keep_their_proportion(self, parts: list[int], by: int) -> None:
        whole = parse_weights(",".join(f"{part}/{by}" for part in parts), len(parts))
        assert all(math.isclose(one / whole[0], part / parts[0]) for one, part in zip(whole, parts, strict=True))

    @pytest.mark.parametrize("text", ["", "a,b", "1", "1,2,3", "1,0", "1,-1", "nan,1", "inf,1", "1/0,1", "1,", "0.7654321,1"])
    def test_anything_else_is_a_usage_error(self, text: str) -> None:
        with pytest.raises(UsageError, match="--weight"):
            parse_weights(text, 2)


class TestConvert:
    """What a format cannot hold is said before it is lost."""

    def to_dat(self, value: Matrix) -> tuple[str, ...]:
        return convert(gguf(value), "dat", None).remarks

    def test_a_dense_matrix_loses_nothing(self) -> None:
        assert self.to_dat(matrix()) == ()

    def test_counts_per_expert_are_lost(self) -> None:
        value = matrix({EXPERTS: entry([[1], [2]], [5, 6]), QUERY: entry([1], 11)})
        assert self.to_dat(value) == ("counts per expert of 1 tensors are lost: a legacy file holds one",)

    def test_unseen_experts_become_one(self) -> None:
        (_, unseen) = self.to_dat(matrix({EXPERTS: entry([[1], [0], [0]], [5, 0, 0])}))
        assert unseen == "2 experts without data in 1 tensors become 1, an equal weight for all columns"

    def test_entries_without_data_are_left_out(self) -> None:
        value = matrix({EXPERTS: entry([[0], [0]], [0, 0]), QUERY: entry([1], 11)})
        assert self.to_dat(value)[-1] == f"1 entries without any data are left out, the first is {EXPERTS}"

    def test_of_several_datasets_the_last_is_kept(self) -> None:
        assert self.to_dat(matrix(datasets=("a", "b"))) == ("of 2 dataset names only the last is kept",)

    def test_a_legacy_chunk_size_is_assumed_and_said(self) -> None:
        made = convert(legacy({QUERY: entry([3], 2)}), "gguf", None)
        assert made.remarks == ("the file does not state its chunk size: 512 assumed (--chunk-size says another)",)
        assert (made.matrix.chunk_size, made.matrix.counts(QUERY).tolist()) == (512, [1024])

    def test_a_legacy_chunk_size_can_be_told(self) -> None:
        made = convert(legacy({QUERY: entry([3], 2)}), "gguf", 100)
        assert made.remarks == ()
        assert (made.matrix.chunk_size, made.matrix.counts(QUERY).tolist()) == (100, [200])
        assert made.matrix.entries[QUERY].sums.tolist() == [[300]]

    def test_a_chunk_size_that_the_file_tells_wins(self) -> None:
        made = convert(gguf(matrix()), "gguf", 512)
        assert made.remarks == ("the file states its chunk size, 64; --chunk-size 512 is not used",)
        assert made.matrix.chunk_size == 64

    def test_a_legacy_mixture_keeps_its_single_count(self) -> None:
        assert "one count for all experts" in convert(legacy({EXPERTS: entry([3], 2)}), "gguf", 512).remarks[-1]


def round_trip(made: Made, path: Path) -> Matrix:
    write(made.matrix, path, "dat" if path.suffix == ".dat" else "gguf")
    return read(path).matrix


def test_gguf_to_dat_and_back_keeps_the_means(tmp_path: Path) -> None:
    value = matrix({QUERY: entry([1, 2, 3, 4], 128), EXPERTS: entry([[1, 2], [0, 0]], [100, 0])}, datasets=("a", "b"))
    old = round_trip(convert(gguf(value), "dat", None), tmp_path / "old.dat")
    again = round_trip(convert(read(tmp_path / "old.dat"), "gguf", 64), tmp_path / "again.gguf")
    assert (old.chunk_size, old.chunk_count, old.datasets) == (0, 2, ("b",))
    assert (again.chunk_size, again.chunk_count, again.datasets) == (64, 2, ("b",))
    assert again.entries[QUERY].sums.tolist() == [[1, 2, 3, 4]]
    assert again.counts(QUERY).tolist() == [128]
    mixture = again.entries[EXPERTS]
    np.testing.assert_allclose(mixture.sums / mixture.counts[0], [[0.01, 0.02, 1, 1]], rtol=1e-6)


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=9), st.integers(1, 500), st.sampled_from([1, 64, 512]))
def test_dat_to_gguf_and_back_keeps_the_bytes(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], calls: int, chunk_size: int
) -> None:
    """With chunks of a power of two nothing is rounded on the way there; on the way back it is by one unit at most."""
    folder = tmp_path_factory.mktemp("dat")
    write(Matrix({QUERY: entry(values, calls)}, 1, calls, ("a.txt",)), folder / "a.dat", "dat")
    first = read(folder / "a.dat").matrix
    round_trip(convert(read(folder / "a.dat"), "gguf", chunk_size), folder / "b.gguf")
    again = round_trip(convert(read(folder / "b.gguf"), "dat", None), folder / "c.dat")
    assert replace(again, entries={}) == replace(first, entries={})
    assert again.counts(QUERY).tolist() == first.counts(QUERY).tolist()
    np.testing.assert_allclose(again.entries[QUERY].sums, first.entries[QUERY].sums, rtol=4e-7, atol=1e-42)


@pytest.mark.parametrize("kind", ["gguf", "dat"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e39])
def test_what_llama_quantize_would_refuse_is_not_written(tmp_path: Path, bad: float, kind: str) -> None:
    with pytest.raises(InvalidDataError, match=f"{QUERY} holds NaN, infinite values or sums beyond float32"):
        write(matrix({QUERY: entry([1, bad], 64)}), tmp_path / "out", kind)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "kind", "why"),
    [
        (matrix(chunk_count=1 << 32), "gguf", "counts are larger than the format can hold"),
        (matrix(chunk_count=1 << 31), "dat", "counts are larger than the format can hold"),
        (matrix({QUERY: entry([1], 0)}), "dat", "none of its entries counted a token"),
        (matrix({"blk.0." + "x" * 60 + ".weight": entry([1], 1)}), "gguf", "longer than a GGUF imatrix can hold"),
    ],
)
def test_what_a_format_cannot_hold_is_not_written(tmp_path: Path, value: Matrix, kind: str, why: str) -> None:
    with pytest.raises(InvalidDataError, match=why):
        write(value, tmp_path / "out", kind)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
