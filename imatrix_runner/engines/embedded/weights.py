"""The imatrix as llama-quantize hands it to llama.cpp: per weight one float32 for every column (of every expert).

A second, smaller reader than the one of ``imatrix/``: here the values must come out bit for bit as in llama.cpp's
``tools/quantize/quantize.cpp`` (``load_imatrix``, ``prepare_imatrix``) and ``common/imatrix-loader.cpp``, in float32. A
mixture's has a gigabyte, so a GGUF's entries are read when they are asked for, every time. The file is untrusted: every length
is checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo, read_header

Values = npt.NDArray[np.float32]

MAX_TEXT = 127
"""Bytes of a text that fit into one of llama.cpp's metadata overrides; the rest is cut off."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_UINT32, _STRING, _ARRAY = 4, 8, 9  # gguf.h, enum gguf_type
_GGUF_HEAD = 24  # magic, version, and how many tensors and keys there are
_LEGACY_ENTRY = 12  # three lengths at least


@dataclass(frozen=True)
class Weights:
    """``values`` by name (bytes, as llama.cpp compares them), the first dataset's name if one is told, and the chunks."""

    values: Mapping[bytes, Values]
    dataset: bytes | None
    chunks: int

    def choose(self, include: Sequence[bytes], exclude: Sequence[bytes]) -> Weights:
        """Only the entries whose names contain one of ``include`` (if any are given) and none of ``exclude``."""
        kept = [
            name
            for name in self.values
            if (not include or any(part in name for part in include)) and not any(part in name for part in exclude)
        ]
        return replace(self, values=Chosen(self.values, kept))

    def not_finite(self) -> float | None:
        """The first NaN or infinity; None as it should be. Reads everything."""
        for values in self.values.values():
            if not np.isfinite(values).all():
                return float(values[~np.isfinite(values)][0])
        return None


class Chosen(Mapping[bytes, Values]):
    """Some entries of another mapping, in their order."""

    def __init__(self, values: Mapping[bytes, Values], names: Sequence[bytes]) -> None:
        self._values, self._names = values, dict.fromkeys(names)

    def __getitem__(self, name: bytes) -> Values:
        if name not in self._names:
            raise KeyError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _InFile(Mapping[bytes, Values]):
    """The entries of a GGUF, read when they are asked for."""

    def __init__(self, path: Path, header: GgufHeader, entries: Mapping[bytes, tuple[TensorInfo, TensorInfo]]) -> None:
        self._path, self._header, self._entries = path, header, entries

    def __getitem__(self, name: bytes) -> Values:
        sums, counts = self._entries[name]
        with self._path.open("rb") as handle:
            return _gguf_values(self._path, handle, self._header, name.decode(), sums, counts)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_weights(path: Path) -> Weights:
    """Read an imatrix of either format. Raises :class:`InvalidDataError`."""
    try:
        with path.open("rb") as handle:
            if handle.read(4) == b"GGUF":
                return _read_gguf(path, handle)
            return _Legacy(path, handle).read()
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}", path) from error


def _bad(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{path} is not a usable imatrix", why, "Give another file, or let one be made with --imatrix generate."
    )


def _read_gguf(path: Path, handle: IO[bytes]) -> Weights:
    header = read_header(path)
    sums = {tensor.name[: -len(_SUMS)]: tensor for tensor in header.tensors if tensor.name.endswith(_SUMS)}
    counts = {tensor.name[: -len(_COUNTS)]: tensor for tensor in header.tensors if tensor.name.endswith(_COUNTS)}
    if not sums:
        raise _bad(path, "it is a GGUF without imatrix data")
    if sums.keys() != counts.keys():
        raise _bad(path, f"{min(sums.keys() ^ counts.keys())} has sums without counts, or counts without sums")
    if missing := [key for key in (_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE) if key not in header.kv_sizes]:
        raise _bad(path, f"the metadata key {missing[0]} is missing")
    numbers = {}
    for key in (_CHUNK_COUNT, _CHUNK_SIZE):
        kind, number = struct.unpack("<Ii", _raw_value(handle, header, key).ljust(8, b"\0")[:8])
        if kind != _UINT32:
            raise _bad(path, f"{key} is not stored as a 32-bit number")
        numbers[key] = int(number)
    values = _InFile(path, header, {name.encode(): (sums[name], counts[name]) for name in sums})
    return Weights(values, _first_dataset(_raw_value(handle, header, _DATASETS)), numbers[_CHUNK_COUNT])


def _gguf_values(path: Path, handle: IO[bytes], header: GgufHeader, name: str, sums: TensorInfo, counts: TensorInfo) -> Values:
    """Sums by counts, in float32; 1 for an expert that saw nothing."""
    if sums.type_name != "F32" or counts.type_name != "F32":
        raise _bad(path, f"{name} is not stored as F32")
    n_experts = counts.n_elements
    if n_experts == 0 or sums.n_elements == 0 or sums.n_elements % n_experts:
        raise _bad(path, f"{name} has {sums.n_elements} sums for {n_experts} counts")
    told = _floats(path, handle, header.data_offset + counts.offset, n_experts).astype(np.float64)
    if not (np.abs(told) < 2.0**63).all():
        raise _bad(path, f"{name} has a count that is NaN, infinite or absurd")
    # std::lround, then (float): half away from zero.
    rounded = np.copysign(np.floor(np.abs(told) + 0.5), told).astype(np.float32)[:, np.newaxis]
    values = _floats(path, handle, header.data_offset + sums.offset, sums.n_elements).reshape(n_experts, -1)
    seen = rounded > 0
    with np.errstate(all="ignore"):  # llama.cpp looks for NaN and infinity itself
        values /= np.where(seen, rounded, np.float32(1))
    np.copyto(values, np.float32(1), where=~seen)
    return values.ravel()


def _raw_value(handle: IO[bytes], header: GgufHeader, key: str) -> bytes:
    """Type and value of a metadata entry as they lie in the file, as far as they are of interest here.

    :class:`GgufHeader` holds texts decoded, and a file name need not be UTF-8.
    """
    start = _GGUF_HEAD
    for name, size in header.kv_sizes.items():
        if name == key:
            break
        start += size
    skipped = 8 + len(key.encode())
    handle.seek(start + skipped)
    return handle.read(min(header.kv_sizes[key] - skipped, 24 + MAX_TEXT))


def _first_dataset(raw: bytes) -> bytes | None:
    kind, element, count, length = struct.unpack("<IIQQ", raw[:24].ljust(24, b"\0"))
    if kind != _ARRAY or element != _STRING or count == 0:
        return None
    return raw[24 : 24 + min(length, MAX_TEXT)].partition(b"\0")[0]


def _floats(path: Path, handle: IO[bytes], offset: int, count: int) -> Values:
    handle.seek(offset)
    data: npt.NDArray[np.float32] = np.fromfile(handle, "<f4", count)
    if data.size < count:
        raise InvalidDataError(f"{path} changed while it was read", "it now ends earlier", "Run the same command again.")
    return data.astype(np.float32, copy=False)


class _Legacy:
    """The legacy layout, little endian: i32 n; n times (i32 len, name, i32 ncall, i32 nval, f32[nval]); then perhaps
    i32 chunks, i32 len, dataset. A value was stored as mean square times ncall."""

    def __init__(self, path: Path, handle: IO[bytes]) -> None:
        self._path, self._handle = path, handle
        self._size = path.stat().st_size
        handle.seek(0)

    def read(self) -> Weights:
        n_entries = self._integer()
        if not 0 < n_entries <= self._left // _LEGACY_ENTRY:
            raise self._strange(f"it would have {n_entries} entries")
        values: dict[bytes, Values] = {}
        for _ in range(n_entries):
            # C strings: a name ends at its first NUL; of two equal names the later counts.
            name = self._take(self._integer()).partition(b"\0")[0]
            calls, n_values = self._integer(), self._integer()
            if n_values < 1 or 4 * n_values > self._left:
                raise self._strange(f"an entry would have {n_values} values")
            entry = _floats(self._path, self._handle, self._handle.tell(), n_values)
            if calls > 0:
                with np.errstate(all="ignore"):
                    entry /= np.float32(calls)
            values[name] = entry
        return Weights(values, *self._trailer())

    def _trailer(self) -> tuple[bytes | None, int]:
        if self._left < 4:
            # Whatever of the number was there has been read into it.
            return None, int.from_bytes(self._take(self._left), "little")
        chunks = self._integer()
        if self._left < 4:
            return None, chunks
        length = self._integer()
        if not 0 < length <= self._left:
            return None, chunks
        return self._take(length).partition(b"\0")[0][:MAX_TEXT], chunks

    @property
    def _left(self) -> int:
        return self._size - self._handle.tell()

    def _take(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise self._strange("a length does not fit the file's size")
        return self._handle.read(size)

    def _integer(self) -> int:
        return int(struct.unpack("<i", self._take(4).ljust(4, b"\0"))[0])

    def _strange(self, why: str) -> InvalidDataError:
        return _bad(self._path, f"neither a GGUF nor a whole legacy imatrix: {why}")
