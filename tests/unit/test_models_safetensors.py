"""The weights of a checkpoint are checked before a conversion starts."""

from __future__ import annotations

import json
import struct
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models import safetensors_file
from imatrix_runner.models.convert import refuse_code, resolve_outtype
from imatrix_runner.models.safetensors_file import INDEX, check_safetensors, read_directory
from support.tiny_models import DType, write_hf_directory, write_packed


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def one(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_hf_directory(tmp_path / "model", layers=1, shards=2)


def test_reads_all_shards(checkpoint: Path) -> None:
    weights = check_safetensors(checkpoint)
    assert [path.name for path in weights.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert len(weights.tensors) == 12
    assert weights.main_dtype == "BF16"
    embedding = next(weight for weight in weights.tensors if weight.name == "model.embed_tokens.weight")
    assert embedding.shape == (512, 256)
    assert embedding.n_bytes == 2 * embedding.n_elements


def test_more_tensors_than_any_model_has_cost_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "_MAX_TENSORS", 20)
    for shard in range(2):
        header = {f"{shard}-{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(15)}
        (tmp_path / f"model-{shard}.safetensors").write_bytes(pack(header))
    with pytest.raises(InvalidDataError, match="announces more tensors than any model has"):
        check_safetensors(tmp_path)
    (tmp_path / "model-0.safetensors").write_bytes(
        pack({f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(21)})
    )
    with pytest.raises(InvalidDataError, match="announces 21 tensors"):
        read_directory(tmp_path / "model-0.safetensors")


def test_a_shape_of_a_million_dimensions_is_not_multiplied(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(one("F32", [1 << 62] * 300_000, 0, 4), bytes(4)))
    began = time.process_time()
    with pytest.raises(InvalidDataError, match="impossible tensor") as caught:
        read_directory(path)
    assert time.process_time() - began < 5
    assert len(caught.value.why) < 1000


def test_missing_and_truncated_shards_are_named(checkpoint: Path) -> None:
    second = checkpoint / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-10])
    with pytest.raises(InvalidDataError, match="is truncated") as caught:
        check_safetensors(checkpoint)
    assert second.name in caught.value.what
    assert str(len(whole)) in caught.value.why
    second.unlink()
    with pytest.raises(InvalidDataError, match="1 of the 2 weight files") as caught:
        check_safetensors(checkpoint)
    assert second.name in caught.value.why


def test_without_an_index_the_numbers_tell_what_is_missing(tmp_path: Path) -> None:
    for number in (1, 3):
        write_packed(tmp_path / f"model-{number:05d}-of-00003.safetensors", {f"t{number}": ("F32", (2, 2))})
    with pytest.raises(InvalidDataError, match="1 of the 3 weight files") as caught:
        check_safetensors(tmp_path)
    assert "no number 00002" in caught.value.why
    write_packed(tmp_path / "model-00002-of-00003.safetensors", {"t2": ("F32", (2, 2))})
    assert len(check_safetensors(tmp_path).tensors) == 3


def test_an_index_must_stay_inside_and_tell_the_truth(checkpoint: Path) -> None:
    index = checkpoint / INDEX
    document = json.loads(index.read_text())
    document["weight_map"]["absent.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(document))
    with pytest.raises(InvalidDataError, match="1 tensors of") as caught:
        check_safetensors(checkpoint)
    assert "absent.weight" in caught.value.why
    for outside in ("../model.safetensors", "/etc/passwd", 3):
        document["weight_map"]["absent.weight"] = outside
        index.write_text(json.dumps(document))
        with pytest.raises(InvalidDataError, match="not an index"):
            check_safetensors(checkpoint)
    index.write_text("{")
    with pytest.raises(InvalidDataError):
        check_safetensors(checkpoint)


def test_pickles_and_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="has no weights"):
        check_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(InvalidDataError, match="pickle"):
        check_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (struct.pack("<Q", 1 << 50) + b"{}", "announces a header"),
        (struct.pack("<Q", 5000) + b"{}", "truncated in its header"),
        (pack(b"{nonsense"), "cannot be read"),
        (pack({"x": 3}), "cannot be read"),
        (pack(one("F32", [2], 0, 8), bytes(7)), "is truncated"),
        (pack(one("F32", [2], 0, 8), bytes(9)), "too long"),
        (pack(one("F32", [3], 0, 8), bytes(8)), "impossible tensor"),
        (pack(one("F32", [2], 4, 12), bytes(12)), "impossible tensor"),
        (pack(one("F32", [-2], 0, 8), bytes(8)), "impossible tensor"),
        (pack(one("F32", [2], 8, 0), bytes(8)), "impossible tensor"),
    ],
)
def test_refuses_each_damage(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidDataError) as caught:
        read_directory(path)
    assert said in caught.value.what + caught.value.why
    assert caught.value.todo


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_are_read_or_refused(tmp_path: Path, content: bytes, framed: bool) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(b"{" + content) if framed else content)
    with suppress(InvalidDataError):
        read_directory(path)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_auto_keeps_what_is_published(tmp_path: Path, dtype: DType) -> None:
    directory = write_hf_directory(tmp_path / "model", layers=1, dtype=dtype)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "float64"}))
    assert resolve_outtype(directory) == dtype


def test_auto_of_packed_weights_asks_the_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(pack(one("F8_E4M3", [2, 2], 0, 4), bytes(4)))
    assert resolve_outtype(tmp_path) == "bf16"
    (tmp_path / "config.json").write_text('{"text_config": {"dtype": "float16"}}')
    assert resolve_outtype(tmp_path) == "f16"


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_broken_json_of_a_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InvalidDataError, match="cannot be read"):
        refuse_code(tmp_path)
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    refuse_code(tmp_path)


def test_code_that_came_with_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refuse_code(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x--y.Z", null]}}')
    with pytest.raises(InvalidDataError, match="auto_map") as caught:
        refuse_code(tmp_path)
    assert "--trust-remote-code" in caught.value.todo
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "tokenizer.py").write_text("raise SystemExit")
    with pytest.raises(InvalidDataError, match="sub/tokenizer"):
        refuse_code(tmp_path)
