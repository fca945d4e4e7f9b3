"""Writes imatrix files of both formats, one entry at a time, byte for byte as llama-imatrix does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.models.gguf_writer import write_gguf_file
from imatrix_runner.models.imatrix_layout import imatrix_tensors, legacy_begin, legacy_end, legacy_entry

Numbers = npt.NDArray[Any]


def write_gguf_imatrix(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    numbers: Callable[[str], tuple[Numbers, Numbers]],
    entries: Sequence[bytes],
    *,
    exact: bool = False,
) -> None:
    """Write a GGUF with F32 sums and counts of every weight, sorted by name; with ``exact`` F64 sums and I64 counts.

    ``shapes``: weight -> (n_mat, n_columns). ``numbers``: a weight's sums [n_mat, n_columns] and counts [n_mat]; called once
    for each, in the order of writing. ``entries``: the metadata, which begins with
    :func:`~imatrix_runner.models.imatrix_layout.imatrix_entries`.
    """
    names = sorted(shapes)
    kinds = ("<f8", "<i8") if exact else ("<f4", "<f4")

    def data() -> Iterator[Numbers]:
        for name in names:
            for values, kind in zip(numbers(name), kinds, strict=True):
                yield values.astype(kind, copy=False)

    tensors = [tensor for name in names for tensor in imatrix_tensors(name, *shapes[name], exact=exact)]
    write_gguf_file(path, entries, tensors, data())


def write_legacy_imatrix(
    path: Path, n_entries: int, entries: Iterable[tuple[bytes, int, npt.NDArray[np.float32]]], chunk_count: int, dataset: bytes
) -> None:
    """Write a legacy ``.dat``. ``entries``: name, calls, and mean squares times calls, ``n_entries`` of them in this order."""
    with path.open("wb") as out:
        out.write(legacy_begin(n_entries))
        for name, calls, values in entries:
            out.write(legacy_entry(name, calls, values))
        out.write(legacy_end(chunk_count, dataset))
