"""The shared reader of imatrix files: what llama.cpp's loader takes, and what is refused where a user's file is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from imatrix_runner.engines.files.imatrix_file import read_imatrix
from imatrix_runner.engines.files.imatrix_weights import read_weights
from imatrix_runner.engines.files.imatrix_writer import write_gguf_imatrix, write_legacy_imatrix
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_writer import long_entry
from imatrix_runner.models.imatrix_layout import CHUNK_COUNT, imatrix_entries

QUERY = "blk.0.attn_q.weight"
VALUES = np.array([1, 2, 3], np.float32)


def legacy(path: Path, names: Sequence[bytes] = (QUERY.encode(),), *, calls: int = 2, chunks: int = 5) -> Path:
    """Every entry holds :data:`VALUES` times its number, from 1."""
    entries = ((name, calls, VALUES * number) for number, name in enumerate(names, 1))
    write_legacy_imatrix(path, len(names), entries, chunks, b"a\0b\xff")
    return path


def gguf(path: Path, counts: Sequence[float], *, chunks: int = 5, datasets: Sequence[str] = ("text",)) -> Path:
    """One entry with three sums for each count."""
    n_mat = len(counts)
    sums = np.arange(3 * n_mat, dtype=np.float32).reshape(n_mat, 3)
    entries = imatrix_entries(datasets, chunks, 512)
    write_gguf_imatrix(path, {QUERY: (n_mat, 3)}, lambda _: (sums, np.array(counts, np.float32)), entries)
    return path


class TestWeights:
    """As llama-quantize computes them; the real program is asked in the tests of the engines."""

    def test_an_expert_without_tokens_has_ones(self, tmp_path: Path) -> None:
        found = read_weights(gguf(tmp_path / "i.gguf", [2, 0]))
        assert found.values[QUERY.encode()].tolist() == [0, 0.5, 1, 1, 1, 1]
        assert (found.dataset, found.chunks) == (b"text", 5)

    @pytest.mark.parametrize(("count", "divisor"), [(2.5, 3), (1.5, 2), (0.4, 0)])
    def test_counts_are_rounded_half_away_from_zero(self, count: float, divisor: int, tmp_path: Path) -> None:
        found = read_weights(gguf(tmp_path / "i.gguf", [count])).values[QUERY.encode()]
        expected = np.arange(3, dtype=np.float32) / np.float32(divisor) if divisor else np.ones(3, np.float32)
        assert np.array_equal(found, expected)

    def test_chunks_are_an_int_of_c(self, tmp_path: Path) -> None:
        assert read_weights(gguf(tmp_path / "i.gguf", [1], chunks=(1 << 32) - 1)).chunks == -1

    def test_a_count_of_chunks_in_64_bits_is_refused(self, tmp_path: Path) -> None:
        """llama.cpp would abort; who only wants to see the file may."""
        path = tmp_path / "i.gguf"
        entries = [entry for entry in imatrix_entries(["text"], 5, 512) if CHUNK_COUNT.encode() not in entry]
        write_gguf_imatrix(path, {QUERY: (1, 3)}, lambda _: (VALUES, VALUES[:1]), [*entries, long_entry(CHUNK_COUNT, 5)])
        assert read_imatrix(path).chunk_count == 5
        with pytest.raises(InvalidDataError, match="not stored as a 32-bit number"):
            read_weights(path)

    def test_legacy_values_are_divided_by_their_calls(self, tmp_path: Path) -> None:
        found = read_weights(legacy(tmp_path / "i.dat"))
        assert found.values[QUERY.encode()].tolist() == [0.5, 1, 1.5]
        assert (found.dataset, found.chunks) == (b"a", 5)
        assert read_weights(legacy(tmp_path / "i.dat", calls=0)).values[QUERY.encode()].tolist() == [1, 2, 3]

    def test_entries_are_read_when_they_are_asked_for(self, tmp_path: Path) -> None:
        path = gguf(tmp_path / "i.gguf", [1, 1])
        found = read_weights(path).values
        with path.open("r+b") as file:
            file.truncate(200)
        with pytest.raises(InvalidDataError, match="changed while it was read"):
            found[QUERY.encode()]


class TestLegacy:
    """What the loader takes and the programs never write."""

    @pytest.mark.parametrize(
        ("names", "why"),
        [
            ((b"",), "a name of 0 bytes"),
            ((b"blk\xff.weight",), "name is not text"),
            ((b"blk.0\0.weight",), "name holds control characters"),
        ],
        ids=["empty", "no UTF-8", "NUL"],
    )
    def test_odd_names(self, names: Sequence[bytes], why: str, tmp_path: Path) -> None:
        path = legacy(tmp_path / "i.dat", names)
        assert tuple(read_imatrix(path).entries) == names
        with pytest.raises(InvalidDataError, match=why):
            read_imatrix(path, strict=True)

    def test_of_two_entries_with_one_name_the_later_counts(self, tmp_path: Path) -> None:
        path = legacy(tmp_path / "i.dat", (b"a.weight", b"a.weight\0tail"))
        assert read_weights(path).values[b"a.weight"].tolist() == [1, 2, 3]

    @pytest.mark.parametrize(("calls", "chunks", "why"), [(-1, 5, "from -1 calls"), (1, -5, "its chunk count is -5")])
    def test_negative_numbers(self, calls: int, chunks: int, why: str, tmp_path: Path) -> None:
        path = legacy(tmp_path / "i.dat", calls=calls, chunks=chunks)
        assert read_imatrix(path).chunk_count == chunks
        with pytest.raises(InvalidDataError, match=why):
            read_imatrix(path, strict=True)

    @pytest.mark.parametrize(("cut", "chunks"), [(1, 5), (4, 5), (6, 5), (8, 5), (9, 5), (12, 0)])
    def test_a_cut_end(self, cut: int, chunks: int, tmp_path: Path) -> None:
        """The last bytes are: i32 chunks, i32 length, four bytes of a name."""
        path = legacy(tmp_path / "i.dat")
        path.write_bytes(path.read_bytes()[:-cut])
        found = read_imatrix(path)
        assert (found.chunk_count, found.datasets) == (chunks, ())

    @pytest.mark.parametrize("cut", [1, 4])
    def test_a_cut_dataset_of_a_user_s_file(self, cut: int, tmp_path: Path) -> None:
        path = legacy(tmp_path / "i.dat")
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(InvalidDataError, match="the dataset's name does not fit the file's size"):
            read_imatrix(path, strict=True)

    def test_a_name_as_long_as_the_file_is_not_kept_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "i.dat"
        write_legacy_imatrix(path, 1, [(QUERY.encode(), 1, VALUES)], 5, b"x" * (1 << 20))
        assert read_imatrix(path, strict=True).datasets == (b"x" * (1 << 16),)
