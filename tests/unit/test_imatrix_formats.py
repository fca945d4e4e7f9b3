"""Imatrix files: what we write the real programs read, and what strangers send us is read with care or refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.binaries.engine import BinariesEngine
from imatrix_runner.engines.jobs import QuantizeJob, QuantizeOptions
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import ignore
from imatrix_runner.files import part_path, publish
from imatrix_runner.imatrix.formats import prepare_gguf, read, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, add, problems
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.process import Command, Runner
from imatrix_runner.toolchain.probe import Toolchain
from support.values import DEMO_CHUNKS, DEMO_CONTEXT, entry, matrix, same_matrix

QUERY = "blk.0.attn_q.weight"


def legacy(
    entries: dict[str, tuple[int, list[float]]], *, chunks: int | None = 5, dataset: bytes | None = b"folder/text.txt"
) -> bytes:
    """A legacy ``.dat``, field by field: name -> (calls, values)."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    if chunks is not None:
        data += struct.pack("<i", chunks)
        if dataset is not None:
            data += struct.pack("<i", len(dataset)) + dataset
    return data


LEGACY = legacy({"blk.1.attn_q.weight": (4, [8.0, 2.0]), QUERY: (2, [1.0, 3.0, 5.0])})


def save(folder: Path, content: bytes) -> Path:
    path = folder / "imatrix.dat"
    path.write_bytes(content)
    return path


def tensor_bytes_at(path: Path, name: str) -> int:
    header = read_header(path)
    return header.data_offset + next(tensor.offset for tensor in header.tensors if tensor.name == name)


def with_float(path: Path, tensor: str, value: float) -> Path:
    """The GGUF at ``path``, the first number of one tensor replaced."""
    at = tensor_bytes_at(path, tensor)
    data = path.read_bytes()
    path.write_bytes(data[:at] + struct.pack("<f", value) + data[at + 4 :])
    return path


def patch_directory(path: Path, tensor: str, offset: int, patch: bytes) -> None:
    """Overwrite a tensor's directory entry, ``offset`` bytes behind its number of dimensions: extents, then the type."""
    data = path.read_bytes()
    at = data.index(tensor.encode()) + len(tensor) + 4 + offset
    path.write_bytes(data[:at] + patch + data[at + len(patch) :])


def refusal(path: Path) -> InvalidDataError:
    with pytest.raises(InvalidDataError) as caught:
        read(path)
    assert str(path) in caught.value.what
    assert caught.value.todo
    return caught.value


FLOATS = st.floats(0, float(np.finfo(np.float32).max), width=32)
COUNTS = st.integers(0, 1 << 24)  # beyond, float32 cannot count by ones
NAMES = st.integers(0, 99).map(lambda number: f"blk.{number}.ffn_down.weight")


@st.composite
def entries(draw: st.DrawFn) -> object:
    n_mat, columns = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(FLOATS, min_size=columns, max_size=columns), min_size=n_mat, max_size=n_mat))
    return entry(rows, draw(st.lists(COUNTS, min_size=n_mat, max_size=n_mat)))


MATRICES = st.builds(
    lambda named, size, count, datasets: Matrix(dict(sorted(named.items())), size, count, tuple(datasets)),
    st.dictionaries(NAMES, entries(), min_size=1, max_size=4),
    st.integers(1, 1 << 20),
    st.integers(0, (1 << 32) - 1),
    st.lists(st.text(st.characters(exclude_categories=("Cs",))).filter(str.isprintable), min_size=1, max_size=3),
)


@given(MATRICES)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, written: Matrix) -> None:
    path = tmp_path_factory.mktemp("round") / "imatrix.gguf"
    write_gguf(written, path)
    found = read(path)
    assert found.format == "gguf"
    assert same_matrix(found.matrix, written)


EXACT_ROWS = st.lists(st.lists(st.floats(0, allow_infinity=False), min_size=3, max_size=3), min_size=2, max_size=2)


@given(EXACT_ROWS, st.lists(st.integers(0, 1 << 53), min_size=2, max_size=2))
def test_an_exact_file_keeps_every_bit(tmp_path_factory: pytest.TempPathFactory, rows: object, counts: list[int]) -> None:
    path = tmp_path_factory.mktemp("exact") / "imatrix.gguf"
    written = matrix({"blk.0.ffn_down_exps.weight": entry(rows, counts)})  # type: ignore[arg-type]
    publish(prepare_gguf(written, path, exact=True, facts={"imatrix_runner.note": "for us"}), path)
    assert same_matrix(read(path, exact=True).matrix, written)
    with pytest.raises(InvalidDataError, match="stored as F64, not F32"):
        read(path)  # llama-quantize would refuse it


def test_the_same_matrix_gives_the_same_bytes_under_any_name(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.dat"):
        write_gguf(matrix(), tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.dat").read_bytes()
    assert read(tmp_path / "b.dat").format == "gguf"


def test_a_prepared_file_waits_beside_its_final_name(tmp_path: Path) -> None:
    final = tmp_path / "new" / "imatrix.gguf"
    assert prepare_gguf(matrix(), final) == part_path(final)
    assert not final.exists()
    assert same_matrix(read(part_path(final)).matrix, matrix())


def test_a_place_that_cannot_be_written_to_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidDataError, match=r"writing imatrix\.gguf"):
        write_gguf(matrix(), tmp_path / "file" / "imatrix.gguf")


def test_a_matrix_without_a_dataset_can_be_written_too(tmp_path: Path) -> None:
    write_gguf(matrix(datasets=()), tmp_path / "i.gguf")
    assert read(tmp_path / "i.gguf").describe().endswith("dataset unknown")


def test_a_description_is_one_line_for_people(tmp_path: Path) -> None:
    write_gguf(matrix(datasets=("/home/me/code.txt", "wiki.txt")), tmp_path / "i.gguf")
    assert read(tmp_path / "i.gguf").describe() == "GGUF, 1 entries, 2 chunks of 64 tokens, code.txt, wiki.txt"
    assert read(save(tmp_path, LEGACY)).describe() == "legacy .dat, 2 entries, 5 chunks, text.txt"


class TestRealPrograms:
    """What llama.cpp's own programs make of our files, and we of theirs."""

    def imatrix(self, toolchain: Toolchain, *arguments: str | Path) -> None:
        argv = (str(toolchain.tool("llama-imatrix")), "-m", "unused", "-c", str(DEMO_CONTEXT), *map(str, arguments))
        outcome = Runner().run(Command(argv))
        assert outcome.ok, outcome.tail

    def test_a_real_file_is_read(self, demo_imatrix: Path, demo_model: Path) -> None:
        found = read(demo_imatrix).matrix
        names = {tensor.name for tensor in read_header(demo_model).tensors}
        assert problems(found) == []
        assert set(found.entries) <= names
        assert (found.chunk_size, found.chunk_count) == (DEMO_CONTEXT, DEMO_CHUNKS)
        assert all((entry.counts == DEMO_CHUNKS * DEMO_CONTEXT).all() for entry in found.entries.values())

    def test_llama_imatrix_reads_back_what_we_write(self, toolchain: Toolchain, demo_imatrix: Path, tmp_path: Path) -> None:
        original = read(demo_imatrix).matrix
        write_gguf(original, tmp_path / "ours.gguf")
        self.imatrix(toolchain, "--in-file", tmp_path / "ours.gguf", "-o", tmp_path / "theirs.gguf")
        assert same_matrix(read(tmp_path / "theirs.gguf").matrix, original)

    def test_our_sum_is_that_of_llama_imatrix(self, toolchain: Toolchain, tmp_path: Path) -> None:
        parts = [
            matrix({QUERY: entry([1, 2, 3, 4], 128), "blk.0.ffn_up_exps.weight": entry([[1, 2], [3, 4]], [100, 28])}),
            matrix({QUERY: entry([10, 20, 30, 40], 64)}, chunk_count=1, datasets=("more.txt",)),
        ]
        for number, part in enumerate(parts):
            write_gguf(part, tmp_path / f"{number}.gguf")
        files = [argument for number in range(2) for argument in ("--in-file", tmp_path / f"{number}.gguf")]
        self.imatrix(toolchain, *files, "-o", tmp_path / "theirs.gguf")
        assert same_matrix(read(tmp_path / "theirs.gguf").matrix, add(parts))

    def test_a_real_legacy_file_means_the_same_as_its_gguf(
        self, toolchain: Toolchain, demo_imatrix: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / "imatrix.dat"
        self.imatrix(toolchain, "--in-file", demo_imatrix, "-o", out, "--output-format", "dat")
        found, original = read(out), read(demo_imatrix).matrix
        assert found.format == "dat"
        assert (found.matrix.chunk_count, found.matrix.datasets) == (original.chunk_count, original.datasets[:1])
        assert list(found.matrix.entries) == list(original.entries)
        for name, theirs in found.matrix.entries.items():
            ours = original.entries[name]
            np.testing.assert_allclose(theirs.sums / theirs.counts[0], ours.sums / ours.counts[0], rtol=1e-6)

    def test_llama_quantize_gives_the_same_bytes_with_our_copy(
        self, engine: BinariesEngine, demo_imatrix: Path, demo_model: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / demo_imatrix.name
        write_gguf(read(demo_imatrix).matrix, copy)
        outputs = [tmp_path / "theirs.gguf", tmp_path / "ours.gguf"]
        for imatrix, out in zip((demo_imatrix, copy), outputs, strict=True):
            engine.quantize(QuantizeJob("", demo_model, out, "Q4_K_S", QuantizeOptions(), imatrix, 2, None), ignore)
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


class TestLegacy:
    """The format without a magic number."""

    def test_values_are_kept_as_sums_over_the_calls(self, tmp_path: Path) -> None:
        found = read(save(tmp_path, LEGACY))
        expected = {QUERY: entry([1, 3, 5], 2), "blk.1.attn_q.weight": entry([8, 2], 4)}
        assert found.format == "dat"
        assert same_matrix(found.matrix, Matrix(expected, 0, 5, ("folder/text.txt",)))

    def test_the_oldest_files_end_after_the_entries(self, tmp_path: Path) -> None:
        found = read(save(tmp_path, legacy({QUERY: (1, [1.0])}, chunks=None))).matrix
        assert (found.chunk_count, found.datasets) == (0, ())
        assert read(save(tmp_path, legacy({QUERY: (1, [1.0])}, dataset=None))).matrix.chunk_count == 5

    def test_no_calls_do_not_divide_by_zero(self, tmp_path: Path) -> None:
        assert read(save(tmp_path, legacy({QUERY: (0, [1.0])}))).matrix.entries[QUERY].counts[0] == 1

    def test_a_cut_file_is_refused_wherever_it_was_cut(self, tmp_path: Path) -> None:
        whole_without = {len(LEGACY), len(LEGACY) - 4 - len(b"folder/text.txt"), len(LEGACY) - 8 - len(b"folder/text.txt")}
        for end in range(len(LEGACY)):
            if any(end in range(at, at + 4) for at in whole_without):
                continue  # the trailing fields were added over the years: without them it is an older, whole file
            refusal(save(tmp_path, LEGACY[:end]))

    @given(st.binary(max_size=200))
    def test_noise_is_refused_with_an_error_of_ours(self, tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
        refusal(save(tmp_path_factory.mktemp("noise"), noise))

    @given(st.integers(0, len(LEGACY) - 1), st.binary(min_size=4, max_size=4))
    def test_damage_is_read_or_refused_but_never_crashes(
        self, tmp_path_factory: pytest.TempPathFactory, at: int, patch: bytes
    ) -> None:
        path = save(tmp_path_factory.mktemp("damage"), LEGACY[:at] + patch + LEGACY[at + 4 :])
        try:
            found = read(path).matrix
        except InvalidDataError:
            return
        assert sum(entry.sums.nbytes for entry in found.entries.values()) <= 2 * len(LEGACY)

    @pytest.mark.parametrize(
        "content",
        [
            struct.pack("<i", 0x7FFFFFFF) + b"x" * 100,
            struct.pack("<i", -1) + b"x" * 100,
            struct.pack("<ii", 1, 0x7FFFFFFF) + b"x" * 100,
            struct.pack("<ii", 1, -5) + b"x" * 100,
            struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 0x7FFFFFFF) + b"\0" * 100,
            struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, -1) + b"\0" * 100,
            struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", -1, 1) + b"\0" * 100,
            struct.pack("<ii", 1, 2) + b"\xff\xfe" + struct.pack("<ii", 1, 1) + b"\0" * 100,
            legacy({QUERY: (1, [1.0])}, chunks=-7),
            legacy({QUERY: (1, [1.0])})[: -len(b"folder/text.txt")] + b"x",
        ],
    )
    def test_absurd_lengths_are_refused_without_being_believed(self, tmp_path: Path, content: bytes) -> None:
        refusal(save(tmp_path, content))


class TestHostileGguf:
    """Files that begin like an imatrix."""

    @pytest.fixture
    def good(self, tmp_path: Path) -> Path:
        path = tmp_path / "imatrix.gguf"
        write_gguf(matrix(), path)
        return path

    @pytest.mark.parametrize("count", [float("nan"), float("inf"), 1e30, -1e30])
    def test_an_impossible_count_is_refused(self, good: Path, count: float) -> None:
        assert "count" in refusal(with_float(good, f"{QUERY}.counts", count)).why

    @pytest.mark.parametrize("value", [float("nan"), float("-inf"), -1.0])
    def test_an_impossible_sum_is_read_and_then_named_as_a_problem(self, good: Path, value: float) -> None:
        assert problems(read(with_float(good, f"{QUERY}.in_sum2", value)).matrix)

    def test_a_cut_file_is_refused_wherever_it_was_cut(self, good: Path) -> None:
        data = good.read_bytes()
        ends = [*range(4, 400, 7), *range(400, len(data) - 32, 31)]
        for end in (end for end in ends if end < len(data) - 32):
            good.write_bytes(data[:end])
            with pytest.raises(InvalidDataError):
                read(good)

    @pytest.mark.parametrize("key", [b"imatrix.datasets", b"imatrix.chunk_count", b"imatrix.chunk_size"])
    def test_a_missing_key_is_named(self, good: Path, key: bytes) -> None:
        good.write_bytes(good.read_bytes().replace(key, key[:-1] + b"X"))
        assert key.decode() in refusal(good).why

    def test_sums_without_counts_are_refused(self, good: Path) -> None:
        good.write_bytes(good.read_bytes().replace(b".counts", b".countX"))
        assert f"{QUERY} has sums without counts" in refusal(good).why

    def test_other_numbers_than_float32_are_refused(self, good: Path) -> None:
        patch_directory(good, f"{QUERY}.in_sum2", 2 * 8, struct.pack("<I", 26))  # I32, as wide as F32
        assert "I32, not F32" in refusal(good).why

    def test_more_counts_than_fit_the_sums_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "odd.gguf"
        write_gguf(matrix({QUERY: entry([[1, 2], [3, 4], [5, 6]], [1, 2, 3])}), path)
        patch_directory(path, f"{QUERY}.in_sum2", 8, struct.pack("<Q", 2))  # two rows left, three counts
        assert "4 sums for 3 counts" in refusal(path).why

    def test_a_model_is_called_a_model(self, demo_model: Path) -> None:
        assert "a GGUF of model weights (llama)" in refusal(demo_model).why


def test_an_entry_larger_than_any_tensor_is_refused_unread(tmp_path: Path) -> None:
    """Files with holes: as long as they say, on a few kilobytes of disk."""
    path = tmp_path / "imatrix.dat"
    n_values = 1 << 27
    with path.open("wb") as file:
        file.write(struct.pack("<ii", 1, len(QUERY)) + QUERY.encode() + struct.pack("<ii", 1, n_values))
        file.truncate(file.tell() + 4 * n_values)
    assert "no tensor has more" in refusal(path).why


def test_more_experts_than_any_model_has_are_refused_unread(tmp_path: Path) -> None:
    n_counts = 1 << 28
    names, offsets = (f"{QUERY}.counts", f"{QUERY}.in_sum2"), (0, 4 * n_counts)
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 3)
    for key, kind, value in (
        ("imatrix.datasets", 9, struct.pack("<IQQ", 8, 1, 1) + b"t"),
        ("imatrix.chunk_count", 4, struct.pack("<I", 1)),
        ("imatrix.chunk_size", 4, struct.pack("<I", 512)),
    ):
        head += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value
    for name, offset in zip(names, offsets, strict=True):
        head += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IQQIQ", 2, 1, n_counts, 0, offset)
    path = tmp_path / "imatrix.gguf"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + 8 * n_counts)
    assert "more than any model has experts" in refusal(path).why


@pytest.mark.parametrize("content", [b"", b"\0\0", b"\0" * 4096])
def test_an_empty_or_zero_filled_file_is_called_so(tmp_path: Path, content: bytes) -> None:
    assert "empty or filled with zeros" in refusal(save(tmp_path, content)).why


def test_a_missing_file_and_a_folder_are_errors_of_ours(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.gguf").why
    assert "directory" in refusal(tmp_path).why


@pytest.mark.parametrize(
    ("content", "why", "todo"),
    [
        (LEGACY[: len(LEGACY) // 2], "it was cut short, or a fork of llama.cpp wrote it", "let that convert it"),
        (
            struct.pack("<ii", 1, len(QUERY)) + QUERY.encode() + struct.pack("<iii", 2, -8, 1),
            "a fork of llama.cpp wrote it",
            "let that convert it",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "it is a Git LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "it is a web page", "--imatrix generate"),
        (b"PK\x03\x04" + bytes(100), "it is a zip archive", "--imatrix generate"),
        (b"A text for calibration, given by mistake.\n" * 9, "it is text", "--imatrix generate"),
    ],
)
def test_what_cannot_be_read_is_named(content: bytes, why: str, todo: str, tmp_path: Path) -> None:
    error = refusal(save(tmp_path, content))
    assert why in error.why
    assert todo in error.todo


@pytest.mark.parametrize(("name", "dtype"), [("blk.0.attn_q.weight.in_sum3", np.float32), (f"{QUERY}.in_sum2", np.float16)])
def test_a_gguf_imatrix_of_another_program_is_named(name: str, dtype: type, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "fork.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["x"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor(name, np.ones((1, 8), dtype))
    writer.add_tensor(f"{QUERY}.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "If another program wrote it" in refusal(tmp_path / "fork.gguf").todo
