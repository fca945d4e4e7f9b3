"""The parts of a pass that call no native code: what is on the disk, what is left to do, what may be copied."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imatrix_runner.engines.files.ledger import VERSION, Ledger, LedgerHead, read
from imatrix_runner.engines.ftypes import guessed_ftype
from imatrix_runner.engines.jobs import LEDGER_NAME, Donor, PassLevel, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.engines.worker.quantize.ggml_rows import Type
from imatrix_runner.engines.worker.quantize.gguf_headers import FileLayout, SourceTensor, TensorPlace
from imatrix_runner.engines.worker.quantize.output_files import LevelOutput, file_names
from imatrix_runner.engines.worker.quantize.slabs import Slabs, combine, fill, memory, slabs_at_once
from imatrix_runner.engines.worker.quantize.work_list import Copies, TensorWork, Work, weights_key
from imatrix_runner.models.gguf_file import MAGIC

in_any_folder = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
HEAD = LedgerHead(VERSION, "lineage", "fingerprint", 1 << 18)
F32, BF16 = Type(0, "f32", 1, 4, False), Type(30, "bf16", 1, 2, False)
Q4_K, Q8_0 = Type(12, "q4_K", 256, 144, True), Type(8, "q8_0", 32, 34, True)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(0, 2**40)
entries = st.builds(LedgerEntry, names, names, names, st.integers(0, 9), numbers, numbers, st.integers(0, 2**32 - 1))


def entry(tensor: str, kind: str = "q4_K", weights: str = "w", *, file: int = 0, offset: int = 64, crc: int = 5) -> LedgerEntry:
    return LedgerEntry(tensor, kind, weights, file, offset, 32, crc)


def write_ledger(path: Path, found: Sequence[LedgerEntry], head: LedgerHead = HEAD) -> Path:
    ledger = Ledger(path, head)
    ledger.append(found)
    ledger.close()
    return path


class TestLedger:
    @given(found=st.lists(entries, max_size=6), data=st.data())
    @in_any_folder
    def test_torn_anywhere_it_holds_what_was_whole(self, found: list[LedgerEntry], data: st.DataObject, tmp_path: Path) -> None:
        path = write_ledger(self._fresh(tmp_path), found)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        lines = whole[:cut].count(b"\n")
        if lines == 0:
            head = read(path)  # a head without its newline may be whole; nothing follows it
            assert head is None or head == (HEAD, {})
        else:
            assert read(path) == (HEAD, {one.tensor: one for one in found[: lines - 1]})

    @given(first=st.lists(entries, min_size=1, max_size=4), more=st.lists(entries, max_size=3), data=st.data())
    @in_any_folder
    def test_after_a_tear_it_goes_on(
        self, first: list[LedgerEntry], more: list[LedgerEntry], data: st.DataObject, tmp_path: Path
    ) -> None:
        path = write_ledger(self._fresh(tmp_path), first)
        whole = path.read_bytes()
        start = whole.index(b"\n") + 1
        path.write_bytes(whole[: data.draw(st.integers(start, len(whole)))])
        kept = read(path)
        assert kept is not None
        write_ledger(path, more)
        assert read(path) == (HEAD, {**kept[1], **{one.tensor: one for one in more}})

    @given(data=st.binary(max_size=200))
    @in_any_folder
    def test_what_is_no_ledger_is_none(self, data: bytes, tmp_path: Path) -> None:
        path = self._fresh(tmp_path)
        path.write_bytes(data)
        assert read(path) is None

    @given(found=st.lists(entries, min_size=2, max_size=4), data=st.data())
    @in_any_folder
    def test_what_follows_a_strange_line_does_not_count(
        self, found: list[LedgerEntry], data: st.DataObject, tmp_path: Path
    ) -> None:
        """A page that was never written reads as zeros."""
        path = write_ledger(self._fresh(tmp_path), found)
        lines = path.read_bytes().splitlines(keepends=True)
        bad = data.draw(st.integers(1, len(found)))
        lines[bad] = bytes(len(lines[bad]) - 1) + b"\n"
        path.write_bytes(b"".join(lines))
        assert read(path) == (HEAD, {one.tensor: one for one in found[: bad - 1]})

    @pytest.mark.parametrize(
        "head",
        [
            LedgerHead(VERSION, "another", "fingerprint", 1 << 18),
            LedgerHead(VERSION, "lineage", "another", 1 << 18),
            LedgerHead(VERSION, "lineage", "fingerprint", 7),
        ],
        ids=["lineage", "fingerprint", "slab"],
    )
    def test_of_another_head_it_is_begun_anew(self, head: LedgerHead, tmp_path: Path) -> None:
        path = write_ledger(tmp_path / "l", [entry("a")], head)
        ledger = Ledger(path, HEAD)
        ledger.close()
        assert ledger.entries == {}
        assert read(path) == (HEAD, {})

    def test_of_another_version_it_is_none(self, tmp_path: Path) -> None:
        path = write_ledger(tmp_path / "l", [entry("a")], LedgerHead(VERSION + 1, "lineage", "fingerprint", 1))
        assert read(path) is None
        assert read(tmp_path / "no such file") is None

    def _fresh(self, folder: Path) -> Path:
        (folder / LEDGER_NAME).unlink(missing_ok=True)
        return folder / LEDGER_NAME


def level(out: Path, *, keep_split: bool = False) -> PassLevel:
    job = QuantizeJob("", Path("m.gguf"), out, "Q8_0", QuantizeOptions(keep_split=keep_split), None, None, None)
    return PassLevel("Q8_0", job, (), "fingerprint")


LAYOUT = FileLayout(b"GGUF" + b"header" * 10, 200)
PLACES = {"a": TensorPlace(0, 64, Q8_0, 34), "b": TensorPlace(0, 128, Q8_0, 34)}


class TestOutput:
    def test_until_it_is_finished_nobody_takes_it_for_whole(self, tmp_path: Path) -> None:
        output = self._open(tmp_path)
        (file,) = output.files
        assert file.path.read_bytes()[:10] == b"\0\0\0\0header"
        assert file.path.stat().st_size == 200
        output.write(PLACES["b"], 30, memoryview(b"data"))
        file.finish()
        output.close()
        data = file.path.read_bytes()
        assert data[:64] == LAYOUT.header == MAGIC + data[4:64]
        assert data[158:162] == b"data"
        assert not any(data[64:158])
        assert not any(data[162:])

    def test_the_same_goes_on(self, tmp_path: Path) -> None:
        """The header is written again: that it was on the disk, nobody said."""
        output = self._open(tmp_path)
        output.write(PLACES["a"], 0, memoryview(b"kept"))
        output.record([entry("a")])
        output.close()
        path = output.files[0].path
        path.write_bytes(bytes(64) + path.read_bytes()[64:])
        again = self._open(tmp_path)
        again.close()
        assert again.kept == 1
        assert path.read_bytes()[4:68] == LAYOUT.header[4:] + b"kept"

    @pytest.mark.parametrize("change", ["head", "size", "no file", "no ledger"])
    def test_anything_else_is_begun_anew(self, change: str, tmp_path: Path) -> None:
        output = self._open(tmp_path)
        output.write(PLACES["a"], 0, memoryview(b"lost"))
        output.record([entry("a")])
        output.close()
        path, head = output.files[0].path, HEAD
        if change == "head":
            head = LedgerHead(VERSION, "lineage", "another", 1 << 18)
        elif change == "size":
            path.write_bytes(path.read_bytes()[:-1])
        elif change == "no file":
            path.unlink()
        else:
            (tmp_path / LEDGER_NAME).unlink()
        again = self._open(tmp_path, head)
        again.close()
        assert again.kept == 0
        assert not any(path.read_bytes()[64:])
        assert read(tmp_path / LEDGER_NAME) == (head, {})

    def test_who_cannot_begin_takes_no_space(self, tmp_path: Path) -> None:
        output = self._open(tmp_path)
        output.give_up()
        assert list(tmp_path.iterdir()) == []
        begun = self._open(tmp_path)
        begun.record([entry("a")])
        begun.give_up()
        begun.close()
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize(
        ("keep_split", "count", "expected"),
        [
            (False, 1, ["m.Q8-Q8_0.gguf"]),
            (True, 1, ["m.Q8-Q8_0-00001-of-00001.gguf"]),
            (True, 2, ["m.Q8-Q8_0-00001-of-00002.gguf", "m.Q8-Q8_0-00002-of-00002.gguf"]),
        ],
    )
    def test_names_are_llama_quantize_s(self, keep_split: bool, count: int, expected: list[str]) -> None:
        found = file_names(level(Path("/x/m.Q8-Q8_0.gguf"), keep_split=keep_split), count)
        assert found == [Path("/x") / name for name in expected]

    def _open(self, folder: Path, head: LedgerHead = HEAD) -> LevelOutput:
        return LevelOutput.open(level(folder / "m.gguf"), [LAYOUT], PLACES, head)


class TestCopies:
    def donor(self, folder: Path, found: Sequence[LedgerEntry], head: LedgerHead = HEAD) -> Donor:
        return Donor((folder / "a.gguf",), write_ledger(folder / "l", found, head))

    def test_a_pair_is_told_by_tensor_type_and_weights(self, tmp_path: Path) -> None:
        copies = Copies("lineage", 1 << 18)
        copies.add_donor(self.donor(tmp_path, [entry("t", offset=96, crc=9), entry("u", file=1)]))
        (copy,) = copies.of("t", Q4_K, "w")
        assert (copy.path, copy.offset, copy.crc) == (tmp_path / "a.gguf", 96, 9)
        assert copies.of("t", Q4_K, "other") == copies.of("t", Q8_0, "w") == copies.of("v", Q4_K, "w") == []
        assert copies.of("u", Q4_K, "w") == []  # in a file that the donor does not have

    @pytest.mark.parametrize(
        "head", [LedgerHead(VERSION, "other", "f", 1 << 18), LedgerHead(VERSION, "lineage", "f", 1)], ids=["lineage", "slab"]
    )
    def test_a_donor_of_another_kind_has_nothing_to_give(self, head: LedgerHead, tmp_path: Path) -> None:
        copies = Copies("lineage", 1 << 18)
        copies.add_donor(self.donor(tmp_path, [entry("t")], head))
        copies.add_donor(Donor((), tmp_path / "none"))
        assert copies.of("t", Q4_K, "w") == []

    def test_weights_key(self) -> None:
        weights = np.arange(256, dtype=np.float32)
        other = weights.copy()
        other[-1] += 1
        assert weights_key(Q4_K, weights) == weights_key(Q4_K, weights.copy()) != weights_key(Q4_K, other)
        assert weights_key(Q4_K, None) not in ("", weights_key(Q4_K, weights))
        assert weights_key(Q8_0, weights) == weights_key(Q8_0, None) == ""


class TestWork:
    @given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 400))
    def test_slabs_cover_every_row_once(self, n_per_row: int, n_rows: int, rows: int) -> None:
        tensor = SourceTensor(0, 0, (n_per_row, n_rows), F32, 4 * n_per_row * n_rows)
        part = TensorWork(BF16, False, "stock", "", [], [])
        work = Work("t", tensor, [part], rows, lambda: np.empty(0, np.float32))
        covered = [row for first in work.slabs for row in range(first, min(first + rows, n_rows))]
        assert covered == list(range(n_rows))
        assert [work.slabs_done(1) for _ in work.slabs] == [False] * (len(work.slabs) - 1) + [True]
        assert work.cost == tensor.n_elements
        taken = Slabs([work], lambda: False, slabs_at_once(192))
        several = [slabs for _, slabs in iter(taken.take, None)]
        assert [first for slabs in several for first in slabs] == list(work.slabs)
        assert len(several) < len(work.slabs) or len(work.slabs) == 1

    def test_weights_are_read_once_and_let_go_at_the_end(self) -> None:
        reads: list[int] = []

        def read_weights() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            reads.append(1)
            return np.ones(8, np.float32)

        work = Work("t", SourceTensor(0, 0, (8, 4), F32, 128), [], 2, read_weights)
        assert work.weights() is work.weights()
        assert [work.slabs_done(1), work.slabs_done(1)] == [False, True]
        work.weights()
        assert len(reads) == 2

    def test_what_is_of_the_type_already_or_a_copy_is_not_computed(self) -> None:
        work = Work("t", SourceTensor(0, 0, (8, 4), F32, 128), [], 2, lambda: np.empty(0, np.float32))
        assert not work.computes(TensorWork(F32, False, "stock", "", [], []))
        assert work.computes(TensorWork(Q8_0, False, "stock", "", [], []))

    @pytest.mark.parametrize(
        ("shape", "rows", "per_expert"),
        [((), 1, 1), ((5,), 1, 1), ((5, 3), 3, 3), ((5, 3, 2), 6, 3), ((0, 3), 0, 3)],
        ids=str,
    )
    def test_shapes(self, shape: tuple[int, ...], rows: int, per_expert: int) -> None:
        tensor = SourceTensor(0, 0, shape, F32, 0)
        assert (tensor.rows if tensor.n_per_row else 0, tensor.rows_per_expert) == (rows, per_expert)


@given(st.dictionaries(st.integers(0, 1000), st.binary(min_size=1, max_size=9), min_size=1), st.randoms(use_true_random=False))
def test_a_checksum_is_the_same_in_whatever_order_slabs_were_made(slabs: dict[int, bytes], random: Random) -> None:
    crcs = {first: zlib.crc32(data) for first, data in slabs.items()}
    shuffled = list(crcs.items())
    random.shuffle(shuffled)
    assert combine(crcs) == combine(dict(shuffled))
    changed = {**crcs, max(crcs): crcs[max(crcs)] ^ 1}
    assert combine(changed) != combine(crcs)


def test_a_file_that_ends_too_early_is_told(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    buffer = memory(6)
    with path.open("rb", buffering=0) as file:
        fill(file, buffer, 4, 6)
        assert bytes(buffer) == b"456789"
        with pytest.raises(OSError, match="ends before byte 11") as raised:
            fill(file, buffer, 5, 6)
    assert raised.value.filename == str(path)


@pytest.mark.parametrize(
    ("types", "constant"),
    [
        ({}, "ALL_F32"),
        ({"a": "q4_K", "b": "f32", "c": "q4_K"}, "MOSTLY_Q4_K_M"),
        ({"blk.10.a": "q8_0", "blk.9.a": "bf16", "blk.9.b": "bf16", "blk.10.b": "q8_0"}, "MOSTLY_BF16"),
        ({"blk.10.a": "q8_0", "blk.11.a": "bf16", "token": "bf16", "blk.10.b": "q8_0"}, "MOSTLY_Q8_0"),
        ({"a": "mxfp4", "b": "mxfp4", "c": "f32"}, "ALL_F32"),
    ],
    ids=["none", "most", "of two the first", "of two the first in order", "a type without a file type"],
)
def test_the_file_type_of_a_model_that_does_not_say_it(types: dict[str, str], constant: str) -> None:
    ftypes = {"ALL_F32": 0, "MOSTLY_Q8_0": 7, "MOSTLY_Q4_K_M": 15, "MOSTLY_BF16": 32, "GUESSED": 1024}
    assert guessed_ftype(types, ftypes) == ftypes[constant] | 1024
