"""The layout of an imatrix on disk: keys and tensor names of the GGUF, and fields of the legacy ``.dat``.

Source: ``save_imatrix`` in tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from imatrix_runner.models.gguf_writer import NewTensor, integer_entry, text_entry, texts_entry

SUMS, COUNTS = ".in_sum2", ".counts"
"""Suffixes to a weight's name: the tensor of its sums of squares, and that of its counts (one per expert)."""

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"

_F32, _I64, _F64 = 0, 27, 28  # ggml.h, enum ggml_type


def imatrix_entries(datasets: Sequence[str], chunk_count: int, chunk_size: int) -> list[bytes]:
    """The metadata of a GGUF imatrix. llama-quantize requires every key, and GGUF readers reject an empty list."""
    return [
        text_entry("general.type", "imatrix"),
        texts_entry(DATASETS, list(datasets) or [""]),
        integer_entry(CHUNK_COUNT, chunk_count),
        integer_entry(CHUNK_SIZE, chunk_size),
    ]


def imatrix_tensors(name: str, n_mat: int, n_columns: int, *, exact: bool = False) -> Iterator[NewTensor]:
    """The two tensors of one weight: both F32, or with ``exact``, for this program's own files, F64 sums and I64 counts."""
    sums, counts = (_F64, _I64) if exact else (_F32, _F32)
    yield NewTensor(name + SUMS, (n_columns, n_mat), sums)
    yield NewTensor(name + COUNTS, (1, n_mat), counts)


def legacy_begin(n_entries: int) -> bytes:
    """The beginning of a legacy file: i32 number of entries."""
    return struct.pack("<i", n_entries)


def legacy_entry(name: bytes, calls: int, values: npt.NDArray[np.float32]) -> bytes:
    """One weight of a legacy file: i32 length, name, i32 calls, i32 values, f32[values]; each value is a mean square times
    ``calls``."""
    head = struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, values.size)
    return head + values.astype("<f4", copy=False).tobytes()


def legacy_end(chunk_count: int, dataset: bytes) -> bytes:
    """The end of a legacy file, after the entries: i32 chunks, i32 length, dataset."""
    return struct.pack("<ii", chunk_count, len(dataset)) + dataset
