"""Writes GGUF files: metadata entries, the tensor directory, then the data of each tensor.

Format: ggml/include/gguf.h of llama.cpp, version 3, little endian, with its default alignment.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.models.gguf_file import MAGIC, padded, tensor_bytes

ALIGNMENT = 32
"""GGUF_DEFAULT_ALIGNMENT."""

_VERSION = 3
# gguf.h, enum gguf_type
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64, _FLOAT64 = 4, 5, 6, 7, 8, 9, 10, 12


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: ``shape`` in ggml order, ``type`` the number of a ggml type of known size."""

    name: str
    shape: tuple[int, ...]
    type: int

    @property
    def n_bytes(self) -> int:
        """Size of its data in bytes. Raises ``ValueError`` for a type of unknown size."""
        n_bytes = tensor_bytes(self.shape, self.type)
        if n_bytes is None:
            raise ValueError(f"the size of {self.name} (type {self.type}, shape {self.shape}) is not known")
        return n_bytes


def gguf_header(entries: Iterable[bytes], tensors: Sequence[NewTensor]) -> bytes:
    """Everything before the data, padded: metadata ``entries`` (see :func:`text_entry`) and the tensor directory."""
    keys = list(entries)
    directory = bytearray()
    offset = 0
    for tensor in tensors:
        directory += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        directory += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.type, offset)
        offset += padded(tensor.n_bytes, ALIGNMENT)
    head = MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(keys)) + b"".join(keys) + bytes(directory)
    return head.ljust(padded(len(head), ALIGNMENT), b"\0")


def write_gguf_file(
    path: Path, entries: Iterable[bytes], tensors: Sequence[NewTensor], data: Iterable[npt.NDArray[Any]]
) -> None:
    """Write a whole file. ``data``: one array per tensor, with its numbers as stored (little endian)."""
    head = gguf_header(entries, tensors)
    with path.open("wb") as out:
        out.write(head)
        for tensor, numbers in zip(tensors, data, strict=True):
            if numbers.nbytes != tensor.n_bytes:
                raise ValueError(f"{tensor.name} has {numbers.nbytes} bytes of data and needs {tensor.n_bytes}")
            out.write(np.ascontiguousarray(numbers).data)
            out.write(bytes(padded(tensor.n_bytes, ALIGNMENT) - tensor.n_bytes))


def text_entry(key: str, value: str) -> bytes:
    """A metadata entry with a string."""
    return _text(key) + struct.pack("<I", _STRING) + _text(value)


def texts_entry(key: str, values: Sequence[str]) -> bytes:
    """A metadata entry with an array of strings."""
    return _text(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + b"".join(map(_text, values))


def integer_entry(key: str, value: int) -> bytes:
    """A metadata entry with a uint32."""
    return _text(key) + struct.pack("<II", _UINT32, value)


def integers_entry(key: str, values: Sequence[int]) -> bytes:
    """A metadata entry with an array of int32."""
    return _text(key) + struct.pack(f"<IIQ{len(values)}i", _ARRAY, _INT32, len(values), *values)


def flag_entry(key: str, *, value: bool) -> bytes:
    """A metadata entry with a bool."""
    return _text(key) + struct.pack("<I?", _BOOL, value)


def long_entry(key: str, value: int) -> bytes:
    """A metadata entry with a uint64."""
    return _text(key) + struct.pack("<IQ", _UINT64, value)


def float_entry(key: str, value: float) -> bytes:
    """A metadata entry with a float32."""
    return _text(key) + struct.pack("<If", _FLOAT32, value)


def double_entry(key: str, value: float) -> bytes:
    """A metadata entry with a float64."""
    return _text(key) + struct.pack("<Id", _FLOAT64, value)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
