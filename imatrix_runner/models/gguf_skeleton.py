"""Write small GGUF files of which only the header matters: metadata as given, tensor data all zeros (a hole in the file).

Programs that decide by names and shapes alone are asked with such files; see :mod:`imatrix_runner.engines.binaries.skeleton`
and :mod:`imatrix_runner.toolchain.capabilities`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.models.gguf_file import GgufHeader, padded, tensor_bytes

ALIGNMENT = 32
_VERSION = 3
_UINT32, _FLOAT32, _STRING, _ARRAY = 4, 6, 8, 9  # gguf.h, enum gguf_type
_HEAD = 24  # magic, version, and the numbers of tensors and keys


@dataclass(frozen=True)
class ZeroTensor:
    """A tensor of zeros: ``shape`` in ggml order, ``type`` the number of a ggml type whose size is known."""

    name: str
    shape: tuple[int, ...]
    type: int


def write_zeros(path: Path, entries: Iterable[bytes], tensors: Sequence[ZeroTensor]) -> None:
    """Write a GGUF of these metadata ``entries`` (see :func:`text_entry`, :func:`copied_entries`) and zero tensors."""
    keys = list(entries)
    directory = bytearray()
    offset = 0
    for tensor in tensors:
        n_bytes = tensor_bytes(tensor.shape, tensor.type)
        if n_bytes is None:
            raise ValueError(f"the size of {tensor.name} (type {tensor.type}, shape {tensor.shape}) is not known")
        directory += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
        directory += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.type, offset)
        offset += padded(n_bytes, ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", _VERSION, len(tensors), len(keys)) + b"".join(keys) + bytes(directory)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(padded(len(head), ALIGNMENT) + offset)


def copied_entries(header: GgufHeader, *, without: tuple[str, ...]) -> list[bytes]:
    """The metadata entries of an existing file, byte for byte, but for the keys that begin with one of ``without``."""
    found: list[bytes] = []
    with header.path.open("rb") as file:
        file.seek(_HEAD)
        for key, size in header.kv_sizes.items():
            entry = file.read(size)
            if not key.startswith(without):
                found.append(entry)
    return found


def text_entry(key: str, value: str) -> bytes:
    """A metadata entry that holds a string."""
    return _text(key) + struct.pack("<I", _STRING) + _text(value)


def texts_entry(key: str, values: Sequence[str]) -> bytes:
    """A metadata entry that holds an array of strings."""
    return _text(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(values)) + b"".join(map(_text, values))


def integer_entry(key: str, value: int) -> bytes:
    """A metadata entry that holds a uint32."""
    return _text(key) + struct.pack("<II", _UINT32, value)


def float_entry(key: str, value: float) -> bytes:
    """A metadata entry that holds a float32."""
    return _text(key) + struct.pack("<If", _FLOAT32, value)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return struct.pack("<Q", len(encoded)) + encoded
