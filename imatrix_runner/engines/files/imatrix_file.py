"""Reads imatrix files: GGUF (current llama-imatrix) and the legacy ``.dat``, recognised by content, never by name.

Accepts what llama.cpp's loader (common/imatrix-loader.cpp) accepts, and interprets nothing: names and datasets are bytes,
numbers have the type in which they are stored. Both formats are untrusted input: every length is checked against the file's
size before anything is allocated. A mixture's imatrix can be a gigabyte, so an entry's numbers stay on disk until requested.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.open_file import OpenFile
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import MAGIC, GgufHeader, TensorInfo, raw_value, read_header
from imatrix_runner.models.imatrix_layout import CHUNK_COUNT, CHUNK_SIZE, COUNTS, DATASETS, SUMS
from imatrix_runner.models.sniff import HEAD_BYTES, LFS_POINTER, UNKNOWN, foreign_format, is_legacy_imatrix
from imatrix_runner.safe_text import printable

ImatrixFormat = Literal["gguf", "dat"]

_MAX_ENTRIES = 1 << 17  # as many tensors as a GGUF may have
_MAX_COUNTS = 1 << 20  # experts of all entries; the largest mixtures have 60 layers of 512 with three tensors each
_MAX_VALUES = 1 << 26  # of one entry: 512 MiB as float64; the largest real ones have 7 million
_MAX_LEGACY_NAME = 1 << 10
_MAX_LEGACY_DATASET = 1 << 16  # the rest is dropped
_LEAST_LEGACY_ENTRY = 16  # three numbers and one value
_STRING, _ARRAY = 8, 9  # gguf.h, enum gguf_type
_OTHER = "Give another file, or let one be made with --imatrix generate."
_FORK = (
    "Download or copy it again. If another program wrote it, let that convert it to llama.cpp's .dat or .gguf; or let one be "
    "made with --imatrix generate."
)


@dataclass(frozen=True)
class StoredEntry:
    """One weight's data: ``n_mat`` rows of ``n_columns`` sums (a row for each expert), and a count for each row.

    In a legacy file there is one row, ``calls`` is its count and ``counts_at`` None. ``exact``: F64 sums and I64 counts.
    """

    file: OpenFile
    n_mat: int
    n_columns: int
    sums_at: int
    counts_at: int | None = None
    calls: int = 0
    exact: bool = False

    @property
    def n_values(self) -> int:
        return self.n_mat * self.n_columns

    def sums(self) -> npt.NDArray[Any]:
        """Read the sums: float32 [n_mat, n_columns], float64 if exact."""
        numbers = self.file.array(self.sums_at, self.n_values, "<f8" if self.exact else "<f4")
        return numbers.reshape(self.n_mat, self.n_columns)

    def counts(self) -> npt.NDArray[Any]:
        """Read the counts: float32 [n_mat], int64 if exact; int64 [1] for a legacy file."""
        if self.counts_at is None:
            return np.array([self.calls], np.int64)
        return self.file.array(self.counts_at, self.n_mat, "<i8" if self.exact else "<f4")


@dataclass(frozen=True)
class ImatrixFile:
    """An imatrix as stored. ``entries`` in the file's order; of two legacy entries with one name the later is used.

    ``datasets`` need not be UTF-8. For a legacy file ``header`` is None and ``chunk_size`` 0: its counts are calls.
    """

    path: Path
    format: ImatrixFormat
    entries: Mapping[bytes, StoredEntry]
    datasets: tuple[bytes, ...]
    chunk_count: int
    chunk_size: int
    header: GgufHeader | None = None


def read_imatrix(path: Path, *, exact: bool = False, strict: bool = False) -> ImatrixFile:
    """Read the directory of an imatrix. Raises :class:`InvalidDataError`, which names what the file is instead.

    ``exact`` also accepts F64 sums with I64 counts, as in this program's own unfinished work; llama-quantize refuses them.
    ``strict`` refuses legacy files with what llama.cpp's loader takes but its programs never write: names that are not
    printable text, negative numbers, a truncated end. The format has no magic number, so other files can look like it.
    """
    try:
        with path.open("rb") as handle:
            magic = handle.read(len(MAGIC))
        if magic == MAGIC:
            return _read_gguf(path, exact=exact)
        if not magic.strip(b"\0"):
            raise unusable(path, "the file is empty or filled with zeros: an interrupted download or save left it")
        return _Legacy(path, strict=strict).read()
    except OSError as error:
        raise unusable(path, error.strerror or str(error), "Give the path of an imatrix file.") from error


def unusable(path: Path, why: str, todo: str = _OTHER) -> InvalidDataError:
    """The error for a file that is not a usable imatrix."""
    return InvalidDataError(f"{path} is not a usable imatrix", why, todo)


def unusable_legacy(path: Path, why: str) -> InvalidDataError:
    """The error for a file that is not a complete legacy imatrix; it names the kind of file if that is recognised."""
    with path.open("rb") as handle:
        head = handle.read(HEAD_BYTES)
    if is_legacy_imatrix(head):
        return unusable(path, f"{why}; it was cut short, or a fork of llama.cpp wrote it in a layout of its own", _FORK)
    foreign = foreign_format(head, path.stat().st_size, path)
    if foreign.seems == UNKNOWN.seems:
        return unusable(path, why)
    seems = f"neither a GGUF nor a legacy imatrix: it is {foreign.seems}"
    return unusable(path, seems, foreign.todo if head.startswith(LFS_POINTER) else _OTHER)


def _read_gguf(path: Path, *, exact: bool) -> ImatrixFile:
    header = read_header(path)
    sums = {tensor.name[: -len(SUMS)]: tensor for tensor in header.tensors if tensor.name.endswith(SUMS)}
    counts = {tensor.name[: -len(COUNTS)]: tensor for tensor in header.tensors if tensor.name.endswith(COUNTS)}
    if not sums:
        raise _without_sums(header)
    if sums.keys() != counts.keys():
        odd = sorted(sums.keys() ^ counts.keys())[0]
        raise unusable(path, f"{odd} has sums without counts, or counts without sums")
    missing = [key for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE) if key not in header.metadata]
    if missing:
        raise unusable(path, f"the metadata key {missing[0]} is missing, and llama-quantize would refuse it")
    datasets = _datasets(header)
    if sum(tensor.n_elements for tensor in counts.values()) > _MAX_COUNTS:
        raise unusable(path, f"its entries have more than {_MAX_COUNTS} counts, more than any model has experts")
    file = OpenFile(path)
    entries = {name.encode(): _gguf_entry(file, header, name, sums[name], counts[name], exact=exact) for name in sums}
    size, count = _whole_number(header, CHUNK_SIZE), _whole_number(header, CHUNK_COUNT)
    return ImatrixFile(path, "gguf", entries, datasets, count, size, header)


def _without_sums(header: GgufHeader) -> InvalidDataError:
    kind = header.text("general.architecture")
    if header.text("general.type") == "imatrix" or CHUNK_COUNT in header.metadata:
        first = printable(header.tensors[0].name) if header.tensors else "no tensor at all"
        why = f"its metadata says imatrix, but it has {first} where llama.cpp's files have NAME{SUMS}"
        return unusable(header.path, why, _FORK)
    return unusable(header.path, f"it is a GGUF of model weights ({kind})" if kind else "it is a GGUF without imatrix data")


def _datasets(header: GgufHeader) -> tuple[bytes, ...]:
    if not isinstance(header.metadata[DATASETS], tuple):
        raise unusable(header.path, f"{DATASETS} is not a list of names")
    kind, raw = raw_value(header, DATASETS)
    element, count = struct.unpack("<IQ", raw[:12])
    if kind != _ARRAY or element != _STRING:
        return ()  # llama.cpp reads no names from it either
    names: list[bytes] = []
    at = 12
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", raw, at)
        names.append(raw[at + 8 : at + 8 + length])
        at += 8 + length
    return tuple(names)


def _whole_number(header: GgufHeader, key: str) -> int:
    value = header.metadata[key]
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise unusable(header.path, f"{key} is {value!r}, not a number of chunks or tokens")
    return value


def _gguf_entry(
    file: OpenFile, header: GgufHeader, name: str, sums: TensorInfo, counts: TensorInfo, *, exact: bool
) -> StoredEntry:
    kinds = (sums.type_name, counts.type_name)
    is_exact = kinds == ("F64", "I64")
    if kinds != ("F32", "F32") and not (exact and is_exact):
        raise unusable(file.path, f"{name} is stored as {sums.type_name}, not F32", _FORK)
    n_mat = counts.n_elements
    if n_mat == 0 or sums.n_elements == 0 or sums.n_elements % n_mat:
        raise unusable(file.path, f"{name} has {sums.n_elements} sums for {n_mat} counts")
    if why := _too_large(name, sums.n_elements):
        raise unusable(file.path, why)
    start = header.data_offset
    return StoredEntry(file, n_mat, sums.n_elements // n_mat, start + sums.offset, start + counts.offset, exact=is_exact)


def _too_large(name: str, n_values: int) -> str:
    """Why an entry is too large, or empty. Entries are read into memory; a sparse file can declare one larger than that."""
    return f"{name} has {n_values} values, and no tensor has more than {_MAX_VALUES}" if n_values > _MAX_VALUES else ""


class _Legacy:
    """The legacy layout, little endian: i32 n; n times (i32 len, name, i32 ncall, i32 nval, f32[nval]); then optionally
    i32 last_chunk, i32 len, dataset. Every read is checked against the file's size."""

    def __init__(self, path: Path, *, strict: bool) -> None:
        self._file, self._at, self._strict = OpenFile(path), 0, strict

    def read(self) -> ImatrixFile:
        path = self._file.path
        n_entries = self._integer("the number of entries")
        if not 0 < n_entries <= min(_MAX_ENTRIES, self._file.size // _LEAST_LEGACY_ENTRY):
            raise unusable_legacy(path, f"neither a GGUF nor a legacy imatrix: it would have {n_entries} entries")
        entries: dict[bytes, StoredEntry] = {}
        for index in range(n_entries):
            name, entry = self._entry(index)
            entries[name] = entry
        chunks, datasets = self._end()
        return ImatrixFile(path, "dat", entries, datasets, chunks, 0)

    def _entry(self, index: int) -> tuple[bytes, StoredEntry]:
        path = self._file.path
        length = self._integer(f"the name of entry {index}")
        if not self._strict <= length <= _MAX_LEGACY_NAME:
            raise unusable_legacy(path, f"neither a GGUF nor a legacy imatrix: a name of {length} bytes")
        name = self._take(length, f"the name of entry {index}")
        shown = self._shown(name)
        calls, n_values = self._integer(f"{shown}'s calls"), self._integer(f"{shown}'s size")
        if n_values <= 0 or (self._strict and calls < 0):
            raise unusable_legacy(path, f"{shown} has {n_values} values from {calls} calls")
        if why := _too_large(shown, n_values):
            raise unusable_legacy(path, why)
        return name, StoredEntry(self._file, 1, n_values, self._skip(4 * n_values, f"{shown}'s data"), calls=calls)

    def _shown(self, name: bytes) -> str:
        """The name as text for messages; ``strict`` refuses a name that is not printable text."""
        text = name.decode("utf-8", "replace")
        if self._strict and text.encode() != name:
            raise unusable_legacy(self._file.path, "neither a GGUF nor a legacy imatrix: a tensor's name is not text")
        if self._strict and not text.isprintable():
            why = "neither a GGUF nor a legacy imatrix: a tensor's name holds control characters"
            raise unusable_legacy(self._file.path, why)
        return printable(text)

    def _end(self) -> tuple[int, tuple[bytes, ...]]:
        """The number of chunks and the dataset; both fields were added later, so each may be missing."""
        if self._left < 4:
            # llama.cpp's loader takes the bytes that are there as the number.
            return 0 if self._strict else int.from_bytes(self._take(self._left, "the chunk count"), "little"), ()
        chunks = self._integer("the chunk count")
        if self._strict and chunks < 0:
            raise unusable_legacy(self._file.path, f"its chunk count is {chunks}")
        if self._left < 4:
            return chunks, ()
        length = self._integer("the dataset's name")
        if length == 0 or (not self._strict and not 0 < length <= self._left):
            return chunks, ()
        self._skip(length, "the dataset's name")
        return chunks, (self._file.read(self._at - length, min(length, _MAX_LEGACY_DATASET)),)

    def _skip(self, size: int, what: str) -> int:
        """Skip ``size`` bytes; returns the offset of the first."""
        if not 0 <= size <= self._left:
            why = f"neither a GGUF nor a whole legacy imatrix: {what} does not fit the file's size"
            raise unusable_legacy(self._file.path, why)
        self._at += size
        return self._at - size

    def _take(self, size: int, what: str) -> bytes:
        return self._file.read(self._skip(size, what), size)

    def _integer(self, what: str) -> int:
        return int(struct.unpack("<i", self._take(4, what))[0])

    @property
    def _left(self) -> int:
        return self._file.size - self._at
