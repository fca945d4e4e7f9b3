"""A small, strict reader of GGUF headers.

Files are untrusted, so every length is checked against the size of the file before anything is allocated. Vocabularies have
150,000 entries, so long arrays are skipped, not kept. Whatever llama.cpp's loader refuses is refused here too, with advice.
Format: ggml/include/gguf.h and ggml/src/gguf.cpp of llama.cpp (versions 2 and 3).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from imatrix_runner.bounded import BoundedReader, damaged, opened
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.ggml_types import is_plain, tensor_bytes, type_id, type_name, type_size
from imatrix_runner.models.sniff import HEAD_BYTES, foreign_format
from imatrix_runner.safe_text import printable

__all__ = [
    "LONG",
    "MAGIC",
    "MAX_NAME",
    "GgufHeader",
    "LongArray",
    "TensorInfo",
    "expected_file_size",
    "long_array",
    "padded",
    "raw_value",
    "read_header",
    "tensor_bytes",
    "type_id",
    "type_name",
    "type_size",
    "unknown_types",
]

MAGIC = b"GGUF"

LONG = 1024
"""Arrays with more items than this become a :class:`LongArray`."""

_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 17
_MAX_ITEMS = 1 << 24  # of an array of strings; the largest vocabularies have 2^18 tokens
_MAX_LONG_BYTES = 1 << 28
_ITEM = 40  # bytes of a number in a tuple
MAX_NAME = 63  # GGMLMAX_NAME counts the terminating NUL
_MAX_DIMS = 4
_HEAD = 24  # magic, version, number of tensors, number of keys

_STRING, _ARRAY = 8, 9
# Value type -> its struct code and name (gguf.h, enum gguf_type).
_SCALARS = {
    0: ("B", "uint8"),
    1: ("b", "int8"),
    2: ("H", "uint16"),
    3: ("h", "int16"),
    4: ("I", "uint32"),
    5: ("i", "int32"),
    6: ("f", "float32"),
    7: ("?", "bool"),
    10: ("Q", "uint64"),
    11: ("q", "int64"),
    12: ("d", "float64"),
}


@dataclass(frozen=True)
class LongArray:
    """An array whose items were skipped; :func:`long_array` reads them."""

    element_type: str
    length: int


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor directory. ``shape`` in ggml order (``ne0``, the row length, first).

    ``offset`` is in bytes from the start of the data section; ``n_bytes`` is None for an unknown type.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    type_name: str
    offset: int
    n_bytes: int | None

    @property
    def n_elements(self) -> int:
        return prod(self.shape)

    @property
    def is_quantised(self) -> bool:
        """Whether the type is a block format (an unknown type counts as one)."""
        return not is_plain(self.type_name)

    @property
    def info_bytes(self) -> int:
        """Size in bytes of this entry in the header."""
        return 24 + len(self.name.encode()) + 8 * len(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """Everything before the tensor data. ``kv_sizes``: key -> bytes of the whole entry (key, type and value) in the file.

    ``metadata``: scalars, strings and short arrays (as tuples); longer arrays as :class:`LongArray`. ``data_offset``: the byte
    at which the data section starts, padded to ``alignment``.
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    kv_sizes: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    file_size: int

    def entry_places(self) -> Iterator[tuple[str, int, int]]:
        """Key, offset in the file and size in bytes of every metadata entry."""
        begin = _HEAD
        for key, size in self.kv_sizes.items():
            yield key, begin, size
            begin += size

    def entry_place(self, key: str) -> tuple[int, int]:
        """Offset and size in bytes of the metadata entry ``key``, which must exist."""
        return {name: (begin, size) for name, begin, size in self.entry_places()}[key]

    @property
    def header_kv_bytes(self) -> int:
        """Size in bytes of the key-value section."""
        return sum(self.kv_sizes.values())

    def text(self, key: str) -> str | None:
        """A metadata value, safe to print on a terminal; None if it is missing or not a string."""
        value = self.metadata.get(key)
        return printable(value) if isinstance(value, str) else None

    def integer(self, key: str) -> int | None:
        """A metadata value; None if it is missing or not an integer."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


def padded(count: int, alignment: int) -> int:
    """``count`` rounded up to a multiple of ``alignment``."""
    return -(-count // alignment) * alignment


def expected_file_size(header: GgufHeader) -> int | None:
    """Size in bytes of a complete file with this header (each tensor padded); None if a tensor's type is unknown."""
    total = header.data_offset
    for tensor in header.tensors:
        if tensor.n_bytes is None:
            return None
        total += padded(tensor.n_bytes, header.alignment)
    return total


def read_header(path: Path, size: int | None = None) -> GgufHeader:
    """Read and check everything before the tensor data, and check that the data is complete.

    ``size``: of the whole file in bytes, where ``path`` has only its beginning; then
    :class:`~imatrix_runner.bounded.MoreBytesNeeded` is raised where that ends before the tensor data.
    Raises :class:`InvalidDataError` for anything but a complete little-endian GGUF file of version 2 or 3.
    """
    if (control := path.with_name(f"{path.name}.aria2")).is_file():
        # aria2 creates a file with its full size: it looks complete, and missing parts are zeros.
        raise InvalidDataError(
            f"{path} is an unfinished download",
            f"{control.name} is next to it, which aria2 keeps until the file is complete",
            "Let the download finish; if it has finished, remove that file.",
        )
    with opened(path, size=size) as reader:
        version = _version(reader)
        n_tensors = reader.count(_MAX_TENSORS, 24, "tensors")
        n_keys = reader.count(_MAX_KEYS, 13, "metadata keys")
        metadata, sizes = _metadata(reader, n_keys)
        alignment = _alignment(reader, metadata)
        tensors = tuple(_tensor(reader) for _ in range(n_tensors))
        data_offset = padded(reader.position, alignment) if n_tensors else reader.position
        header = GgufHeader(
            path, version, alignment, MappingProxyType(metadata), MappingProxyType(sizes), tensors, data_offset, reader.size
        )
    _check_tensors(header)
    return header


def unknown_types(path: Path) -> tuple[str, ...]:
    """The distinct tensor types of a file whose size is unknown (of a fork, or dropped by llama.cpp)."""
    return tuple(dict.fromkeys(tensor.type_name for tensor in read_header(path).tensors if tensor.n_bytes is None))


def long_array(path: Path, key: str) -> tuple[Any, ...] | None:
    """All items of one array of the metadata, such as a vocabulary; None if there is no such array."""
    with opened(path, _MAX_LONG_BYTES) as reader:
        _version(reader)
        reader.count(_MAX_TENSORS, 24, "tensors")
        for _ in range(reader.count(_MAX_KEYS, 13, "metadata keys")):
            name, kind = reader.string(), reader.number("I")
            if name == key and kind == _ARRAY:
                items = _array(reader, keep=_MAX_ITEMS)
                return items if isinstance(items, tuple) else None
            _value(reader, kind)
    return None


def raw_value(header: GgufHeader, key: str) -> tuple[int, bytes]:
    """A metadata value as stored: the number of its type (gguf.h, enum gguf_type) and its bytes.

    :class:`GgufHeader` has decoded strings, in which bytes that are not UTF-8 are lost.
    """
    begin, size = header.entry_place(key)
    named = 8 + len(key.encode())
    with opened(header.path) as reader:
        reader.skip(begin + named)
        kind, left = int(reader.number("I")), size - named - 4
        reader.keep(left)
        return kind, reader.take(left)


def _version(reader: BoundedReader) -> int:
    head = reader.head(HEAD_BYTES)
    if not head.startswith(MAGIC):
        foreign = foreign_format(head, reader.size, reader.path)
        raise InvalidDataError(f"{reader.path} is not a GGUF file", f"it is {foreign.seems}", foreign.todo)
    reader.skip(len(MAGIC))
    version = int(reader.number("I"))
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version:
        raise InvalidDataError(
            f"{reader.path} is a big-endian GGUF",
            "it was made for a big-endian machine such as s390x; this program and llama.cpp here read little-endian files",
            "Convert the model again without --bigendian, or get its little-endian GGUF.",
        )
    if version == 1:
        raise InvalidDataError(
            f"{reader.path} is a GGUF of version 1",
            "llama.cpp has not read that version since 2023",
            "Get a GGUF made by a current converter, or convert the original model again.",
        )
    raise InvalidDataError(
        f"{reader.path} has GGUF version {version}",
        "this program knows versions 2 and 3",
        "Upgrade with: pip install -U imatrix-runner; if you have the newest version, the file is damaged.",
    )


def _metadata(reader: BoundedReader, count: int) -> tuple[dict[str, Any], dict[str, int]]:
    metadata: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for _ in range(count):
        start = reader.position
        key = reader.string()
        if not key or key in metadata:
            why = f"the entry at byte {start}; llama.cpp would refuse it"
            raise damaged(
                reader.path, f"has the metadata key {key!r} twice" if key else "has a metadata key without a name", why
            )
        metadata[key] = _value(reader, int(reader.number("I")))
        sizes[key] = reader.position - start
    return metadata, sizes


def _value(reader: BoundedReader, kind: int) -> Any:
    if kind == _STRING:
        return reader.raw_string().decode("utf-8", "replace")
    if kind == _ARRAY:
        return _array(reader, keep=LONG)
    return reader.number(_scalar(reader, kind)[0])


def _array(reader: BoundedReader, keep: int) -> tuple[Any, ...] | LongArray:
    kind = int(reader.number("I"))
    if kind == _STRING:
        count = reader.count(_MAX_ITEMS, 8, "texts of an array")
        if count <= keep:
            return tuple(reader.raw_string().decode("utf-8", "replace") for _ in range(count))
        reader.skip_strings(count)
        return LongArray("string", count)
    code, name = _scalar(reader, kind)
    each = struct.calcsize("<" + code)
    count = reader.count(reader.size, each, "items of an array")
    if count <= keep:
        reader.keep(_ITEM * count)
        return struct.unpack(f"<{count}{code}", reader.take(count * each))
    reader.skip(count * each)
    return LongArray(name, count)


def _scalar(reader: BoundedReader, kind: int) -> tuple[str, str]:
    if kind not in _SCALARS:
        why = f"before byte {reader.position}; no such type exists"
        raise damaged(reader.path, f"has a metadata value of type {kind}", why)
    return _SCALARS[kind]


def _alignment(reader: BoundedReader, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        why = f"general.alignment is {str(alignment)[:40]!r} and must be a power of two up to {_MAX_ALIGNMENT}"
        raise damaged(reader.path, "has an impossible alignment", why)
    return int(alignment)


def _tensor(reader: BoundedReader) -> TensorInfo:
    start = reader.position
    name = reader.string()
    n_dims = int(reader.number("I"))
    if len(name.encode()) > MAX_NAME or n_dims > _MAX_DIMS:
        why = f"at byte {start}; llama.cpp allows names of {MAX_NAME} bytes and {_MAX_DIMS} dimensions"
        raise damaged(reader.path, f"has the impossible tensor {name[:80]!r} with {n_dims} dimensions", why)
    shape = struct.unpack(f"<{n_dims}Q", reader.take(8 * n_dims))
    number, offset = int(reader.number("I")), int(reader.number("Q"))
    if prod(shape) >= 1 << 63:
        raise damaged(reader.path, f"has a tensor {name!r} of absurd size", f"its shape is {list(shape)}")
    n_bytes = tensor_bytes(shape, number)
    if n_bytes is None and type_size(number) is not None:
        why = f"a row of {shape[0]} elements is not a whole number of {type_name(number)} blocks"
        raise damaged(reader.path, f"has an impossible tensor {name!r}", why)
    return TensorInfo(name, shape, number, type_name(number), offset, n_bytes)


def _check_tensors(header: GgufHeader) -> None:
    """Check that names are unique, and that the data is contiguous, as llama.cpp requires, and complete."""
    names: set[str] = set()
    expected: int | None = 0
    for tensor in header.tensors:
        if tensor.name in names:
            raise damaged(header.path, f"has two tensors named {tensor.name!r}", "llama.cpp would refuse it")
        names.add(tensor.name)
        if (expected is not None and tensor.offset != expected) or tensor.offset % header.alignment:
            why = f"tensor {tensor.name!r} starts at byte {tensor.offset} of the data" + (
                f", expected {expected}" if expected is not None else f", not a multiple of {header.alignment}"
            )
            raise damaged(header.path, "has an inconsistent tensor directory", why)
        end = header.data_offset + tensor.offset + (tensor.n_bytes or 0)
        if end > header.file_size:
            why = (
                f"tensor {tensor.name!r} would end at byte {end}, but the file has {header.file_size}; "
                f"a complete one has {expected_file_size(header) or 'more'} bytes"
            )
            raise damaged(header.path, "is truncated", why)
        expected = None if tensor.n_bytes is None else tensor.offset + padded(tensor.n_bytes, header.alignment)
