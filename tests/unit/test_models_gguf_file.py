"""The header reader: correct on real files, a clear error for everything else, never another exception."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models import ggml_types
from imatrix_runner.models.gguf_file import (
    LongArray,
    expected_file_size,
    long_array,
    read_header,
    tensor_bytes,
    type_id,
    type_name,
    type_size,
)
from support.tiny_models import write_llama_gguf, write_safetensors

U32, STR, ARR = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: Iterable[int] = (4,), number: int = 0, offset: int = 0) -> bytes:
    sizes = tuple(shape)
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)


def gguf(keys: list[bytes], tensors: list[bytes], data: int = 0, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("model") / "tiny-BF16.gguf")


def refusal(tmp_path: Path, content: bytes) -> InvalidDataError:
    path = tmp_path / "file.gguf"
    path.write_bytes(content)
    with pytest.raises(InvalidDataError) as caught:
        read_header(path)
    assert all((caught.value.what, caught.value.why, caught.value.todo))
    return caught.value


def test_reads_what_the_gguf_library_reads(model: Path) -> None:
    header, reference = read_header(model), GGUFReader(model)
    assert header.data_offset == reference.data_offset
    assert [(t.name, list(t.shape), t.n_bytes, header.data_offset + t.offset) for t in header.tensors] == [
        (t.name, t.shape.tolist(), t.n_bytes, t.data_offset) for t in reference.tensors
    ]
    assert set(header.metadata) == {name for name in reference.fields if not name.startswith("GGUF.")}
    assert header.text("general.architecture") == "llama"
    assert header.integer("llama.block_count") == 2
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.metadata["llama.rope.freq_base"] == 10000.0


def test_sizes_add_up_to_the_file(model: Path) -> None:
    header = read_header(model)
    assert expected_file_size(header) == header.file_size == model.stat().st_size
    infos = sum(entry.info_bytes for entry in header.tensors)
    unpadded = 24 + header.header_kv_bytes + infos
    assert 0 <= header.data_offset - unpadded < header.alignment


def test_long_arrays_are_read_on_request(tmp_path: Path) -> None:
    path = tmp_path / "arrays.gguf"
    writer = GGUFWriter(path, "llama")
    tokens = [f"token {number} é" for number in range(3000)]
    writer.add_token_list(tokens)
    writer.add_token_scores([number / 2 for number in range(3000)])
    writer.add_array("short", [1, 2, 3])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    header = read_header(path)
    assert header.metadata["tokenizer.ggml.tokens"] == LongArray("string", 3000)
    assert header.metadata["tokenizer.ggml.scores"] == LongArray("float32", 3000)
    assert header.metadata["short"] == (1, 2, 3)
    assert long_array(path, "tokenizer.ggml.tokens") == tuple(tokens)
    assert long_array(path, "tokenizer.ggml.scores") == tuple(number / 2 for number in range(3000))
    assert long_array(path, "absent") is None
    assert long_array(path, "general.architecture") is None


def test_a_large_vocabulary_is_read_fast_and_in_little_memory(tmp_path: Path) -> None:
    count = 150_000
    tokens = b"".join(text(f"token{number}") for number in range(count))
    strings = key("tokenizer.ggml.tokens", ARR, struct.pack("<IQ", STR, count) + tokens)
    merges = key("tokenizer.ggml.merges", ARR, struct.pack("<IQ", STR, count) + tokens)
    types = key("tokenizer.ggml.token_type", ARR, struct.pack("<IQ", U32, count) + bytes(4 * count))
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf([strings, merges, types], [tensor("x")], 32))
    began = time.process_time()
    read_header(path)
    assert time.process_time() - began < 1.0
    tracemalloc.start()
    try:
        read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def with_holes(path: Path, *parts: bytes | int) -> Path:
    """Write a file of ``parts``: bytes as given, and a number as a hole of that many zeros."""
    with path.open("wb") as file:
        for part in parts:
            if isinstance(part, int):
                file.seek(part, os.SEEK_CUR)
            else:
                file.write(part)
        file.truncate(file.tell())
    return path


def begun(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


HEAD_OF_ONE = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
LONG_TEXT = 15 << 20


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(
            [b"GGUF" + struct.pack("<IQQ", 3, 0, 200)]
            + [part for n in range(200) for part in (begun(f"k{n}", STR, struct.pack("<Q", LONG_TEXT)), LONG_TEXT)],
            id="texts",
        ),
        pytest.param(
            [HEAD_OF_ONE, begun("k", ARR, struct.pack("<IQ", STR, 200))]
            + [part for _ in range(200) for part in (struct.pack("<Q", LONG_TEXT), LONG_TEXT)],
            id="a short array of long texts",
        ),
        pytest.param(
            [b"GGUF" + struct.pack("<IQQ", 3, 0, 60_000)]
            + [part for n in range(60_000) for part in (begun(f"k{n}", ARR, struct.pack("<IQ", U32, 1024)), 4096)],
            id="many short arrays",
        ),
        pytest.param([HEAD_OF_ONE, begun("k", ARR, struct.pack("<IQ", STR, 1 << 30)), 9 << 30], id="empty texts"),
        pytest.param([b"GGUF" + struct.pack("<IQQ", 3, 1 << 30, 0), 30 << 30], id="tensors"),
    ],
)
def test_a_file_with_holes_costs_neither_memory_nor_time(tmp_path: Path, parts: list[bytes | int]) -> None:
    """Each length by itself fits the file, which is sparse and huge."""
    path = with_holes(tmp_path / "m.gguf", *parts)
    assert path.stat().st_size > 200 << 20
    began = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidDataError):
            read_header(path)
        with suppress(InvalidDataError):
            long_array(path, "absent")
        assert tracemalloc.get_traced_memory()[1] < 400 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty file"),
        (bytes(5000), "interrupted llama-quantize"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x80\x02}q\x00", "pickle"),
        (b"tjgg\x03\x00\x00\x00", "GGJT"),
        (b"lmgg\x03\x00\x00\x00", "GGML"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (struct.pack("<ii", 2, 19) + b"blk.0.attn_q.weight" + bytes(50), "importance matrix"),
        (b'{"a": 1}', "JSON"),
        (b"Entry not found", "error message saved under this name; it begins with 'Entry not found'"),
        (b" \n\t", "unknown format"),
        (b"\x9c\x01\xff" * 40, "unknown format"),
        (b"%PDF-1.7\n", "a PDF"),
        (b"\xfd7zXZ\0" + bytes(9), "xz archive"),
        (b"<?xml version='1.0'?><Error/>", "web page"),
    ],
)
def test_says_what_a_foreign_file_is(tmp_path: Path, content: bytes, said: str) -> None:
    error = refusal(tmp_path, content)
    assert "is not a GGUF file" in error.what
    assert said in error.why


@pytest.mark.parametrize(
    ("name", "content", "why", "todo"),
    [
        ("m.gguf.part", bytes(5000), "unfinished download", "finish"),
        ("m.zip", b"PK\x03\x04" + bytes(100), "a zip archive", "Unpack"),
        ("weights.npz", b"PK\x03\x04" + bytes(100), "NumPy arrays", "made from"),
        ("notes.docx", b"PK\x03\x04" + bytes(100), "office document", "GGUF"),
        ("pytorch_model.bin", b"PK\x03\x04" + bytes(100), "PyTorch weights", "safetensors"),
        ("config.json", b'{"architectures": []}', "JSON text", "imatrix-runner run"),
        ("tokenizer.model", b"\n\x0e\xff\xfe", "a tokenizer", "imatrix-runner run"),
        ("model.onnx", b"\x08\x07\x12\x07pytorch", "an ONNX export", "made from"),
        ("README.md", b"# A model", "text; it begins with '# A model'", "GGUF"),
    ],
)
def test_the_name_helps_to_tell_what_a_file_is(tmp_path: Path, name: str, content: bytes, why: str, todo: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidDataError) as caught:
        read_header(tmp_path / name)
    assert why in caught.value.why
    assert todo in caught.value.todo


def test_a_file_that_aria2_still_fills(tmp_path: Path) -> None:
    model = write_llama_gguf(tmp_path / "m.gguf", layers=1)
    (tmp_path / "m.gguf.aria2").write_bytes(b"\0\x01")
    with pytest.raises(InvalidDataError, match="unfinished download") as caught:
        read_header(model)
    assert "m.gguf.aria2" in caught.value.why


def test_recognises_safetensors(tmp_path: Path) -> None:
    import numpy as np

    path = write_safetensors(tmp_path / "model.safetensors", {"x": np.ones((2, 2), np.float32)}, "f32")
    with pytest.raises(InvalidDataError, match="safetensors weights"):
        read_header(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (gguf([], [], version=1), "version 1"),
        (gguf([], [], version=9), "version 9"),
        (b"GGUF\x03\x00", "truncated in its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "metadata keys"),
        (gguf([key("a", STR, struct.pack("<Q", 1 << 62))], []), "string of"),
        (gguf([key("a", STR, struct.pack("<Q", 1 << 20))], []), "truncated in its header"),
        (gguf([key("a", ARR, struct.pack("<IQ", STR, 1 << 40))], []), "texts of an array"),
        (gguf([key("a", ARR, struct.pack("<IQ", U32, 1 << 40))], []), "items of an array"),
        (gguf([key("a", ARR, struct.pack("<IQ", ARR, 1))], [], 64), "type 9"),
        (gguf([key("a", 99, b"")], [], 64), "type 99"),
        (gguf([key("a", U32, bytes(4))] * 2, []), "twice"),
        (gguf([key("", U32, bytes(4))], []), "without a name"),
        (gguf([key("general.alignment", U32, struct.pack("<I", 24))], [tensor("x")], 32), "alignment"),
        (gguf([key("general.alignment", STR, text("32"))], [tensor("x")], 32), "alignment"),
        (gguf([], [tensor("x"), tensor("x", offset=32)], 64), "two tensors named 'x'"),
        (gguf([], [tensor("x"), tensor("y", offset=64)], 128), "inconsistent tensor directory"),
        (gguf([], [tensor("x", (1 << 40, 1 << 40))], 32), "absurd size"),
        (gguf([], [tensor("x", (1, 1, 1, 1, 1))], 32), "impossible tensor"),
        (gguf([], [tensor("n" * 64)], 32), "impossible tensor"),
        (gguf([], [tensor("x", (33,), 8)], 64), "impossible tensor"),
        (gguf([], [tensor("x", (64, 64))], 100), "is truncated"),
    ],
)
def test_refuses_each_damage_with_its_own_sentence(tmp_path: Path, content: bytes, said: str) -> None:
    error = refusal(tmp_path, content)
    assert said in error.what or said in error.why
    assert error.exit_code == 6


def test_truncation_gives_both_sizes(tmp_path: Path, model: Path) -> None:
    whole = model.read_bytes()
    error = refusal(tmp_path, whole[:-1000])
    assert f"{len(whole) - 1000}" in error.why
    assert f"{len(whole)} bytes" in error.why


def test_a_missing_final_padding_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "unpadded.gguf"
    path.write_bytes(gguf([], [tensor("x", (3,))], 12))
    header = read_header(path)
    assert expected_file_size(header) == header.file_size + 20


def test_a_type_of_a_fork_is_kept_open(tmp_path: Path) -> None:
    path = tmp_path / "fork.gguf"
    path.write_bytes(gguf([], [tensor("x", (256,), 97), tensor("y", offset=4096)], 8192))
    header = read_header(path)
    assert header.tensors[0].n_bytes is None
    assert header.tensors[0].type_name == "TYPE_97"
    assert header.tensors[0].is_quantised
    assert expected_file_size(header) is None


def test_directories_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="not a file"):
        read_header(tmp_path)
    with pytest.raises(InvalidDataError, match="No such file"):
        read_header(tmp_path / "absent.gguf")


def test_types() -> None:
    assert type_size(42) == (64, 18)
    assert type_id("q4_K") == 12
    assert type_id("bf16") == 30
    assert type_id("nonsense") is None
    assert type_name(14) == "Q6_K"
    assert type_size(97) is None
    assert tensor_bytes((256, 3), 12) == 3 * 144
    assert tensor_bytes((255, 3), 12) is None


@pytest.mark.parametrize("kind", GGMLQuantizationType)
def test_types_are_those_of_the_gguf_package(kind: GGMLQuantizationType) -> None:
    assert (type_id(kind.name), type_name(kind), type_size(kind)) == (kind, kind.name, GGML_QUANT_SIZES[kind])


def test_a_type_that_only_the_gguf_package_knows_is_taken_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ggml_types._TYPES, "Q6_K")
    monkeypatch.delitem(ggml_types._BY_ID, 14)
    assert (type_id("q6_k"), type_name(14), type_size(14)) == (14, "Q6_K", (256, 210))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_are_read_or_refused(model: Path, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(model.read_bytes()[: 64 << 10])
    header_end = read_header(model).data_offset
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, header_end + 64))
        fragment = data.draw(
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8), b"\x01" + bytes(7)]))
        )
        content[at : at + len(fragment)] = fragment
    path = tmp_path / "mutated.gguf"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    tracemalloc.start()
    try:
        with suppress(InvalidDataError):
            assert read_header(path).file_size == path.stat().st_size
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 << 20


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300), start=st.sampled_from([b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"GGUF\x02\x00\x00\x00"]))
def test_arbitrary_bytes_are_read_or_refused(tmp_path: Path, content: bytes, start: bytes) -> None:
    path = tmp_path / "any.gguf"
    path.write_bytes(start + content)
    outcomes: list[Any] = []
    for read in (read_header, lambda file: long_array(file, "a")):
        try:
            outcomes.append(read(path))
        except InvalidDataError as error:
            outcomes.append(error.todo)
    assert len(outcomes) == 2
