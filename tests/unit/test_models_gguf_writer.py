"""GGUF files equal those of the gguf package, byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from imatrix_runner.models.gguf_file import raw_value, read_header
from imatrix_runner.models.gguf_writer import (
    NewTensor,
    double_entry,
    flag_entry,
    float_entry,
    integer_entry,
    integers_entry,
    long_entry,
    text_entry,
    texts_entry,
    write_gguf_file,
)

F32, I64, F64 = 0, 27, 28
FIRST = np.arange(15, dtype=np.float32).reshape(3, 5)
SECOND = np.arange(3, dtype=np.int64).reshape(3, 1)
THIRD = np.full((2, 1, 4), 1 / 3)
TENSORS = [NewTensor("a.weight", (5, 3), F32), NewTensor("ä", (1, 3), I64), NewTensor("c", (4, 1, 2), F64)]
ENTRIES = [
    text_entry("general.architecture", "llama"),
    text_entry("text", "Füße"),
    texts_entry("texts", ["", "zwölf"]),
    integer_entry("integer", (1 << 32) - 1),
    integers_entry("integers", [-1, 2]),
    long_entry("long", (1 << 64) - 1),
    float_entry("float", 0.1),
    double_entry("double", 0.1),
    flag_entry("flag", value=True),
]


def write_with_package(path: Path) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_string("text", "Füße")
    writer.add_array("texts", ["", "zwölf"])
    writer.add_uint32("integer", (1 << 32) - 1)
    writer.add_array("integers", [-1, 2])
    writer.add_uint64("long", (1 << 64) - 1)
    writer.add_float32("float", 0.1)
    writer.add_float64("double", 0.1)
    writer.add_bool("flag", True)
    for name, array in zip(("a.weight", "ä", "c"), (FIRST, SECOND, THIRD), strict=True):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_bytes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    write_with_package(tmp_path / "theirs.gguf")
    write_gguf_file(tmp_path / "ours.gguf", ENTRIES, TENSORS, iter((FIRST, SECOND, THIRD)))
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_entries_lie_where_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf_file(path, ENTRIES, TENSORS, iter((FIRST, SECOND, THIRD)))
    header, data = read_header(path), path.read_bytes()
    assert [data[begin : begin + size] for _, begin, size in header.entry_places()] == ENTRIES
    assert raw_value(header, "text") == (8, b"\x06\0\0\0\0\0\0\0" + "Füße".encode())
    assert raw_value(header, "integer") == (4, b"\xff\xff\xff\xff")


def test_data_of_another_size_than_its_tensor_s_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.weight has 24 bytes of data and needs 60"):
        write_gguf_file(tmp_path / "model.gguf", ENTRIES, TENSORS[:1], [SECOND])
