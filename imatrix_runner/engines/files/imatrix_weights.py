"""The imatrix as llama-quantize passes it to llama.cpp: for each weight one float32 per column (of every expert).

The values are bit for bit those of llama.cpp's tools/quantize/quantize.cpp (``load_imatrix``, ``prepare_imatrix``) and
common/imatrix-loader.cpp, in float32. A mixture's imatrix takes a gigabyte, so an entry is read each time it is requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.imatrix_file import ImatrixFile, StoredEntry, read_imatrix, unusable
from imatrix_runner.models.gguf_file import GgufHeader, raw_value
from imatrix_runner.models.imatrix_layout import CHUNK_COUNT, CHUNK_SIZE

Values = npt.NDArray[np.float32]

MAX_TEXT = 127
"""Bytes of a text that fit into one of llama.cpp's metadata overrides; longer texts are truncated."""

_UINT32 = 4  # gguf.h, enum gguf_type


@dataclass(frozen=True)
class ImatrixValues:
    """``values`` by name (bytes, as llama.cpp compares them), the name of the first dataset if any, the number of chunks."""

    values: Mapping[bytes, Values]
    dataset: bytes | None
    chunks: int

    def choose(self, include: Sequence[bytes], exclude: Sequence[bytes]) -> ImatrixValues:
        """Only the entries whose names contain one of ``include`` (if any are given) and none of ``exclude``."""
        kept = [
            name
            for name in self.values
            if (not include or any(part in name for part in include)) and not any(part in name for part in exclude)
        ]
        return replace(self, values=_SomeEntries(self.values, kept))

    def not_finite(self) -> dict[bytes, float]:
        """The first NaN or infinite value of each entry that has one. Reads all entries."""
        found: dict[bytes, float] = {}
        for name, values in self.values.items():
            if not np.isfinite(values).all():
                found[name] = float(values[~np.isfinite(values)][0])
        return found


class _SomeEntries(Mapping[bytes, Values]):
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
    """The values of a file's entries, read on access."""

    def __init__(self, entries: Mapping[bytes, StoredEntry]) -> None:
        self._entries = entries

    def __getitem__(self, name: bytes) -> Values:
        entry = self._entries[name]
        return _legacy_values(entry) if entry.counts_at is None else _gguf_values(entry, name)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def read_weights(path: Path) -> ImatrixValues:
    """Read an imatrix of either format. Raises :class:`InvalidDataError`."""
    stored = read_imatrix(path)
    if stored.header is not None:
        _require_uint32(stored.header)
    dataset = stored.datasets[0][:MAX_TEXT].partition(b"\0")[0] if stored.datasets else None
    chunks = int(np.uint32(stored.chunk_count & 0xFFFFFFFF).astype(np.int32))  # int32_t chunk_count
    return ImatrixValues(_InFile(entries_by_c_name(stored)), dataset, chunks)


def entries_by_c_name(stored: ImatrixFile) -> dict[bytes, StoredEntry]:
    """The entries by name as llama.cpp sees them: a name ends at its first NUL, and of two equal names the later is used."""
    return {name.partition(b"\0")[0]: entry for name, entry in stored.entries.items()}


def _require_uint32(header: GgufHeader) -> None:
    """Raise :class:`InvalidDataError` unless the chunk numbers are stored as u32: llama.cpp would abort."""
    for key in (CHUNK_COUNT, CHUNK_SIZE):
        if raw_value(header, key)[0] != _UINT32:
            raise unusable(header.path, f"{key} is not stored as a 32-bit number")


def _gguf_values(entry: StoredEntry, name: bytes) -> Values:
    """Sums divided by counts, in float32; 1 for an expert that saw no token."""
    counts = entry.counts().astype(np.float64)
    if not (np.abs(counts) < 2.0**63).all():
        raise unusable(entry.file.path, f"{name.decode()} has a count that is NaN, infinite or absurd")
    # std::lround, then (float): half away from zero.
    rounded = np.copysign(np.floor(np.abs(counts) + 0.5), counts).astype(np.float32)[:, np.newaxis]
    values: Values = entry.sums().astype(np.float32, copy=False)
    seen = rounded > 0
    with np.errstate(all="ignore"):  # llama.cpp checks for NaN and infinity itself
        values /= np.where(seen, rounded, np.float32(1))
    np.copyto(values, np.float32(1), where=~seen)
    return values.ravel()


def _legacy_values(entry: StoredEntry) -> Values:
    """Stored values divided by calls: a legacy file holds mean square times calls."""
    values: Values = entry.sums().astype(np.float32, copy=False)
    if entry.calls > 0:
        with np.errstate(all="ignore"):
            values /= np.float32(entry.calls)
    return values.ravel()
