"""Imatrix files in which values have other types than any writer gives them; everything follows from the seed.

Flipped bytes rarely leave a file whose directory adds up. These are written as a whole: lengths and offsets are those of what
is in them, so that what reads the values behind the directory is tried, too.
"""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

_STRING, _ARRAY = 8, 9  # gguf.h, enum gguf_type
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_F32 = 0
_SIZES = {0: 4, 1: 2, 24: 1, 25: 2, 26: 4, 27: 8, 28: 8, 30: 2}  # ggml.h, enum ggml_type: bytes of an element

_NAMES = (
    *(b"", b"x", b".in_sum2", b".counts", b"blk.0.attn_q.weight.in_sum2", b"blk.0.attn_q.weight", b"../../x.counts"),
    *(b"\xff\xfe.in_sum2", b"\x1b[2J.counts", "\u202e.in_sum2".encode(), b"a\0b.counts", b"n" * 63, b"n" * 64, b"n" * 5000),
)
_TEXTS = (b"", b"x", b"\xff\xfe", b"\x1b[2J\r\n", "\u202e".encode(), b"a\0b", b"t" * 70_000)
_NUMBERS = (float("nan"), float("inf"), float("-inf"), -1.0, -0.0, 0.0, 0.5, 1e-45, 3.4e38, -3.4e38, 9e15, 2.0**24 + 2)
_VALUES: tuple[tuple[int, Any], ...] = (
    *((kind, number) for kind in (0, 2, 4, 7, 10) for number in (0, 1, 2)),
    *((kind, number) for kind in (1, 3, 5, 11) for number in (-1, 0, 1)),
    *((10, 2**63), (10, 2**64 - 1), (4, 2**32 - 1), (11, -(2**63))),
    *((kind, number) for kind in (6, 12) for number in (float("nan"), float("inf"), -1.0, 1.5, 1e30)),
    *((_STRING, text) for text in _TEXTS),
    *((_ARRAY, (_STRING, texts)) for texts in ([], [b"a"], list(_TEXTS), [b""] * 5000)),
    *((_ARRAY, (kind, [0, 1])) for kind in _CODES),
    *((_ARRAY, (_ARRAY, [])), (99, b""), (_ARRAY, (99, []))),
)
_SHAPES: tuple[tuple[int, ...], ...] = (
    *((), (0,), (1,), (8,), (8, 1), (8, 3), (3, 8), (7, 1), (1, 7), (8, 1, 1, 1), (8, 0)),
    *((2**20, 2**10), (2**31, 2**31), (2**40, 1), (1, 2**40)),
)
_TYPES = (*_SIZES, 2, 8, 12, 39, 999)
_COUNTS = (-(2**31), -1, 0, 1, 2, 3, 7, 8, 64, 2**16, 2**24 + 1, 2**31 - 1)


@dataclass
class Tensor:
    name: bytes
    shape: tuple[int, ...]
    type: int
    values: list[float]


@dataclass
class GgufContent:
    """What a GGUF imatrix says: keys (name, value type, value) and tensors."""

    keys: list[tuple[bytes, int, Any]]
    tensors: list[Tensor]

    @classmethod
    def usual(cls, entries: Sequence[tuple[bytes, int, int]]) -> GgufContent:
        """``entries``: weight, columns, experts."""
        keys: list[tuple[bytes, int, Any]] = [
            (b"general.type", _STRING, b"imatrix"),
            (b"imatrix.datasets", _ARRAY, (_STRING, [b"folder/text.txt"])),
            (b"imatrix.chunk_count", 4, 9),
            (b"imatrix.chunk_size", 4, 64),
        ]
        tensors: list[Tensor] = []
        for name, columns, experts in entries:
            tensors.append(Tensor(name + b".in_sum2", (columns, experts), _F32, [1.5] * columns * experts))
            tensors.append(Tensor(name + b".counts", (1, experts), _F32, [576.0] * experts))
        return cls(keys, tensors)

    def damage(self, draw: random.Random) -> None:
        draw.choice((self._key, self._key, self._tensor, self._tensor, self._tensor, self._order))(draw)

    def _key(self, draw: random.Random) -> None:
        at = draw.randrange(len(self.keys))
        name, kind, value = self.keys[at]
        how = draw.choice(("value", "value", "value", "name", "missing", "twice"))
        if how == "value":
            self.keys[at] = (name, *draw.choice(_VALUES))
        elif how == "name":
            self.keys[at] = (draw.choice(_NAMES), kind, value)
        elif how == "missing" and len(self.keys) > 1:
            del self.keys[at]
        else:
            self.keys.append((name, *draw.choice(_VALUES)))

    def _tensor(self, draw: random.Random) -> None:
        tensor = draw.choice(self.tensors)
        how = draw.choice(("name", "shape", "type", "number", "number", "number", "all"))
        if how == "name":
            tensor.name = draw.choice(_NAMES)
        elif how == "shape":
            tensor.shape = draw.choice(_SHAPES)
        elif how == "type":
            tensor.type = draw.choice(_TYPES)
        elif how == "number" and tensor.values:
            tensor.values[draw.randrange(len(tensor.values))] = draw.choice(_NUMBERS)
        else:
            tensor.values = [draw.choice(_NUMBERS)] * len(tensor.values)

    def _order(self, draw: random.Random) -> None:
        """Tensors in another order, one of them missing, or there twice."""
        draw.shuffle(self.tensors)
        if draw.random() < 1 / 2 and len(self.tensors) > 1:
            self.tensors.pop()
        elif draw.random() < 1 / 2:
            self.tensors.append(copy.deepcopy(draw.choice(self.tensors)))

    def encode(self) -> bytes:
        """Sizes and offsets are right as far as 1 MiB of data goes; what is announced beyond is not there."""
        directory, data = bytearray(), bytearray()
        for tensor in self.tensors:
            directory += _text(tensor.name) + struct.pack("<I", len(tensor.shape))
            directory += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.type, len(data))
            data += _numbers(tensor)
            data += bytes(-len(data) % 32)
        keys = b"".join(_text(name) + struct.pack("<I", kind) + _value(kind, value) for name, kind, value in self.keys)
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.keys)) + keys + bytes(directory)
        return head + bytes(-len(head) % 32) + bytes(data)


@dataclass
class LegacyContent:
    """What a legacy imatrix says: entries (name, calls, values), and the two fields after them."""

    entries: list[tuple[bytes, int, list[float]]]
    chunks: int
    dataset: bytes
    lies: dict[str, int]
    """Numbers that are written in place of the right ones: ``entries``, ``name 2``, ``values 0``, ``dataset``."""

    @classmethod
    def usual(cls, entries: Sequence[tuple[bytes, int, int]]) -> LegacyContent:
        return cls([(name, 9, [1.5] * columns * experts) for name, columns, experts in entries], 9, b"text.txt", {})

    def damage(self, draw: random.Random) -> None:
        at = draw.randrange(len(self.entries))
        name, calls, values = self.entries[at]
        how = draw.choice(("name", "calls", "number", "number", "all", "chunks", "dataset", "lie", "lie"))
        if how == "name":
            self.entries[at] = (draw.choice(_NAMES), calls, values)
        elif how == "calls":
            self.entries[at] = (name, draw.choice(_COUNTS), values)
        elif how == "number":
            values[draw.randrange(len(values))] = draw.choice(_NUMBERS)
        elif how == "all":
            self.entries[at] = (name, calls, [draw.choice(_NUMBERS)] * len(values))
        elif how == "chunks":
            self.chunks = draw.choice(_COUNTS)
        elif how == "dataset":
            self.dataset = draw.choice(_TEXTS)
        else:
            self.lies[draw.choice(("entries", f"name {at}", f"values {at}", "dataset"))] = draw.choice(_COUNTS)

    def encode(self) -> bytes:
        def number(right: int, what: str) -> bytes:
            return struct.pack("<i", self.lies.get(what, right))

        data = number(len(self.entries), "entries")
        for index, (name, calls, values) in enumerate(self.entries):
            data += number(len(name), f"name {index}") + name + struct.pack("<i", calls)
            data += number(len(values), f"values {index}") + b"".join(map(_float32, values))
        return data + struct.pack("<i", self.chunks) + number(len(self.dataset), "dataset") + self.dataset


Content = GgufContent | LegacyContent


def typed_imatrices(kind: str, entries: Sequence[tuple[bytes, int, int]], seed: int) -> Iterator[bytes]:
    """Damaged files without end; ``kind`` is ``gguf`` or ``dat``, ``entries``: weight, columns, experts."""
    draw = random.Random(seed)
    usual: Callable[[Sequence[tuple[bytes, int, int]]], Content] = GgufContent.usual if kind == "gguf" else LegacyContent.usual
    while True:
        content = usual(entries)
        for _ in range(draw.choice((1, 1, 1, 2, 4))):
            content.damage(draw)
        yield content.encode()


def _text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def _value(kind: int, value: Any) -> bytes:
    if kind == _STRING:
        return _text(value)
    if kind == _ARRAY:
        element, items = value
        return struct.pack("<IQ", element, len(items)) + b"".join(_value(element, item) for item in items)
    return struct.pack("<" + _CODES[kind], value) if kind in _CODES else b""


def _numbers(tensor: Tensor) -> bytes:
    size = _SIZES.get(tensor.type, 4)
    wanted = min(prod(tensor.shape) * size, 1 << 20)
    whole = b"".join(map(_float32 if tensor.type == _F32 else lambda number: struct.pack("<d", number), tensor.values))
    return (whole * (wanted // max(1, len(whole)) + 1))[:wanted]


def _float32(number: float) -> bytes:
    return struct.pack("<f", number)
