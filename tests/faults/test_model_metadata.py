"""A model whose metadata says what no converter writes: each key with half of the types and values, one at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.advise.memory import context_memory
from imatrix_runner.errors import InvalidDataError, UsageError
from imatrix_runner.events import ignore
from imatrix_runner.imatrix.plan_generation import active_params, matrix_bytes, projection_share
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.kind import (
    require_calibratable,
    require_loadable,
    require_measurable,
    require_vocabulary,
    vocabulary_size,
)
from imatrix_runner.models.model import Model, open_gguf
from imatrix_runner.models.origin import origin_of_gguf
from imatrix_runner.report.document import ReportModel
from imatrix_runner.report.facts.gather_model import _with_metadata

KEYS = (
    *("general.architecture", "general.name", "general.type", "general.file_type", "general.alignment", "general.url"),
    *("general.quantization_version", "general.base_model.count", "general.base_model.0.repo_url", "general.tags"),
    *("general.languages", "general.license", "general.size_label", "general.source.url", "split.count", "split.no"),
    *("split.tensors.count", "llama.block_count", "llama.context_length", "llama.expert_count", "llama.expert_used_count"),
    *("llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.key_length", "llama.vocab_size"),
    *("llama.attention.sliding_window", "llama.attention.sliding_window_pattern", "llama.nextn_predict_layers"),
    *("llama.embedding_length", "llama.feed_forward_length", "llama.rope.freq_base", "llama.attention.value_length"),
    *("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.chat_template", "tokenizer.ggml.add_eos_token"),
)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


VALUES: tuple[tuple[int, bytes], ...] = (
    (4, struct.pack("<I", 0)),
    (4, struct.pack("<I", 7)),
    (4, struct.pack("<I", (1 << 32) - 1)),
    (5, struct.pack("<i", -1)),
    (6, struct.pack("<f", float("nan"))),
    (6, struct.pack("<f", float("inf"))),
    (7, b"\1"),
    (10, struct.pack("<Q", (1 << 64) - 1)),
    (11, struct.pack("<q", -(1 << 63))),
    (12, struct.pack("<d", -0.0)),
    (8, text(b"")),
    (8, text(b"\x1b[2J\n\xe2\x80\xae")),
    (8, text(b"\xff\xfe")),
    (8, text(b"../../x")),
    (8, text(b"http://[")),
    (9, struct.pack("<IQ", 4, 0)),
    (9, struct.pack("<IQII", 4, 2, 0, (1 << 32) - 1)),
    (9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"\xff")),
    (9, struct.pack("<IQ", 9, 1) * 3000),  # arrays of arrays, thousands deep
    (9, struct.pack("<IQ", 9, 1) + struct.pack("<IQI", 4, 1, 3)),
    (99, b"1234"),
)


def damaged(model: Path) -> Iterator[tuple[str, bytes]]:
    """Headers of ``model``, each with one entry that is changed or new."""
    whole, header = model.read_bytes(), read_header(model)
    begin, entries = 24, {}
    for key, size in header.kv_sizes.items():
        entries[key] = whole[begin : begin + size]
        begin += size
    end = begin + sum(tensor.info_bytes for tensor in header.tensors)
    for number, key in enumerate(KEYS):
        for kind, value in VALUES[number % 2 :: 2]:
            changed = entries | {key: text(key.encode()) + struct.pack("<I", kind) + value}
            head = b"GGUF" + struct.pack("<IQQ", 3, len(header.tensors), len(changed)) + b"".join(changed.values())
            head += whole[begin:end]
            yield f"{key} of type {kind}: {value[:20]!r}", head + bytes(-len(head) % 32)


def write(path: Path, head: bytes, model: Path) -> None:
    """A header, and as much data as ``model`` has, all zeros that no disk holds."""
    path.write_bytes(head)
    os.truncate(path, len(head) + model.stat().st_size - read_header(model).data_offset)


def use(path: Path) -> Model:
    model = open_gguf(path, allow_requantize=True)
    for check in (require_calibratable, require_vocabulary, require_measurable, require_loadable):
        with suppress(InvalidDataError):
            check(model)
    vocabulary_size(model)
    context_memory(model, 512)
    origin_of_gguf(model.header.metadata)
    assert 0 <= active_params(model) <= model.n_params
    assert projection_share(model) >= 0
    assert matrix_bytes(model) >= 0
    known = ReportModel(model.name, "", 0, 0, "", "m.gguf", (), "")
    described: Any = _with_metadata(known, model, None, ignore)
    shown = (described.license, described.license_link, *described.languages, *described.tags, *described.base_models)
    assert all(word.isprintable() for word in (model.name, *shown))
    return model


def test_every_key_with_values_that_no_converter_writes(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    taken = 0
    for what, data in damaged(tiny_model):
        write(path, data, tiny_model)
        try:
            use(path)
            taken += 1
        except (UsageError, InvalidDataError):
            continue
        except Exception as error:
            raise AssertionError(what) from error
    assert 0 < taken < len(KEYS) * len(VALUES)


def test_an_array_of_arrays_is_named(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    nested = (
        data
        for what, data in damaged(tiny_model)
        if what.startswith(("general.tags of type 9: b'\\t", "general.name of type 9: b'\\t"))
    )
    write(path, next(nested), tiny_model)
    with pytest.raises(InvalidDataError, match="has a metadata value of type 9"):
        open_gguf(path, allow_requantize=True)
