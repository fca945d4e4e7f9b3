"""Writes skeletons: small GGUF files with given metadata and tensors of zeros (a hole in the file).

They serve to query programs that decide by names and shapes alone; see :mod:`imatrix_runner.engines.binaries.skeleton` and
:mod:`imatrix_runner.toolchain.capabilities`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from imatrix_runner.models.gguf_file import GgufHeader, padded
from imatrix_runner.models.gguf_writer import ALIGNMENT, NewTensor, gguf_header


def write_zeros(path: Path, entries: Iterable[bytes], tensors: Sequence[NewTensor]) -> None:
    """Write a GGUF of metadata ``entries`` (see :mod:`~imatrix_runner.models.gguf_writer`, :func:`copied_entries`) and tensors
    of zeros."""
    head = gguf_header(entries, tensors)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(padded(tensor.n_bytes, ALIGNMENT) for tensor in tensors))


def copied_entries(header: GgufHeader, *, without: tuple[str, ...]) -> list[bytes]:
    """The metadata entries of an existing file, byte for byte, except keys that begin with one of ``without``."""
    found: list[bytes] = []
    with header.path.open("rb") as file:
        for key, begin, size in header.entry_places():
            if not key.startswith(without):
                file.seek(begin)
                found.append(file.read(size))
    return found
