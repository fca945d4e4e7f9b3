"""Model arguments, names of workspace folders, and files refused as models."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError, RunnerError, UsageError
from imatrix_runner.models.gguf_file import TensorInfo, type_id
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.models.gguf_skeleton import write_zeros
from imatrix_runner.models.gguf_writer import NewTensor, text_entry
from imatrix_runner.models.model import HubId, LocalDirectory, LocalFile, Provenance, model_name, open_gguf, parse_source
from imatrix_runner.models.native_types import keep_native, native_tensors
from support.tiny_models import write_hf_directory, write_llama_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("model") / "Tiny-Llama-BF16.gguf", layers=1)


def header_only(path: Path, *, architecture: str | None = "llama", tensors: bool = True, **text: str) -> Path:
    """A GGUF with a few keys and optionally one small tensor."""
    import numpy as np

    writer = GGUFWriter(path, architecture or "")  # an empty name leaves the key out
    for key, value in text.items():
        writer.add_string(key.replace("__", "."), value)
    if tensors:
        writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split(directory: Path, count: int, stem: str = "big-F16") -> list[Path]:
    """A split set, one tensor per shard, with the names and metadata of llama-gguf-split."""
    import numpy as np

    paths = []
    for number in range(count):
        path = directory / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", count)
        writer.add_tensor(f"blk.{number}.attn_q.weight", np.zeros((4, 8), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_existing_paths_win(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_source(str(model)) == LocalFile(model)
    directory = write_hf_directory(tmp_path / "org" / "name", layers=1)
    assert parse_source(str(directory)) == LocalDirectory(directory)
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/name") == LocalDirectory(Path("org/name"))
    assert parse_source("org/other") == HubId("org/other")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@main", HubId("org/name", "main")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("org/Name-7B_v0.1:BF16/m.gguf", HubId("org/Name-7B_v0.1", None, "BF16/m.gguf")),
        ("org/name@0123abc:m.gguf", HubId("org/name", "0123abc", "m.gguf")),
    ],
)
def test_hub_ids(text: str, expected: HubId) -> None:
    assert parse_source(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", InvalidDataError),
        ("name", InvalidDataError),
        ("a/b/c", InvalidDataError),
        ("/absent/model.gguf", InvalidDataError),
        ("models/absent.gguf", InvalidDataError),
        ("https://example.org/org/name", InvalidDataError),
        ("org/name@", InvalidDataError),
        ("org/na me", InvalidDataError),
        ("org/name:../../etc.gguf", UsageError),
        ("org/name:a\nb.gguf", UsageError),
        ("org/name:model.safetensors", UsageError),
        ("org/a..b", UsageError),
        ("org/name@a/../b", UsageError),
        ("x" * 5000, InvalidDataError),
        ("a\0b", InvalidDataError),
    ],
)
def test_what_is_no_source(text: str, kind: type[RunnerError]) -> None:
    with pytest.raises(kind) as caught:
        parse_source(text)
    assert all((caught.value.what, caught.value.why, caught.value.todo))


def test_a_misspelt_path_names_its_neighbour(model: Path) -> None:
    with pytest.raises(InvalidDataError) as caught:
        parse_source(str(model.with_name("Tiny-LLama-BF16.gguf")))
    assert model.name in caught.value.why


@pytest.mark.parametrize("ending", [".part", ".crdownload", ".incomplete"])
def test_an_unfinished_download_is_known_by_its_name(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"m.gguf{ending}").write_bytes(b"GGUF")
    with pytest.raises(InvalidDataError, match="unfinished download") as caught:
        parse_source(str(tmp_path / f"m.gguf{ending}"))
    assert ending in caught.value.why


def test_a_directory_without_config_names_its_gguf(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(InvalidDataError, match="it has no config") as caught:
        parse_source(str(tmp_path))
    assert str(tmp_path / "m.gguf") in caught.value.todo


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/x/Llama-3.1-8B-BF16.gguf", "Llama-3.1-8B"),
        ("/x/Llama-3.1-8B.gguf", "Llama-3.1-8B"),
        ("/x/model-f16.gguf", "model"),
        ("/x/model.F32.gguf", "model"),
        ("/x/m-BF16-00001-of-00003.gguf", "m"),
        ("/x/m-00002-of-00003.gguf", "m"),
        ("org/Name-7B", "Name-7B"),
        ("org/Name-7B@main", "Name-7B"),
        ("org/Name-GGUF:BF16/Name-BF16.gguf", "Name"),
        ("/x/F16.gguf", "F16"),
        ("/x/..hidden.gguf", "hidden"),
        ("/x/a b\x07c.gguf", "a b_c"),
        ("/x/con.gguf", "_con"),
    ],
)
def test_model_names(text: str, name: str) -> None:
    assert model_name(text) == name


def test_a_directory_gives_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "Model-BF16"
    directory.mkdir()
    assert model_name(directory) == "Model-BF16"
    monkeypatch.chdir(directory)
    assert model_name(".") == "Model-BF16"


def test_long_names_are_cut_and_stay_apart() -> None:
    first, second = model_name("/x/" + "a" * 200 + "1.gguf"), model_name("/x/" + "a" * 200 + "2.gguf")
    assert len(first) == len(second) == 120
    assert first != second


@given(st.text(min_size=1, max_size=200))
def test_every_name_is_one_safe_component(text: str) -> None:
    try:
        name = model_name(f"/absent/{text}.gguf")
    except UsageError:
        return
    assert 0 < len(name) <= 121
    assert Path(name).name == name
    assert name[0] not in ".- "
    assert name.isprintable()


def test_opens_a_model(model: Path) -> None:
    opened = open_gguf(model, allow_requantize=False)
    assert opened.name == "Tiny-Llama"
    assert opened.files == (model,)
    assert opened.path == model
    assert opened.architecture == "llama"
    assert opened.main_type == "BF16"
    assert opened.n_layers == 1
    assert opened.n_experts == 0
    assert opened.n_bytes == model.stat().st_size
    assert opened.n_params == sum(tensor.n_elements for tensor in opened.tensors)
    assert not opened.is_quantised
    assert not opened.is_split
    assert opened.source == Provenance("file", str(model))


def test_a_mixture_knows_its_experts(tmp_path: Path) -> None:
    path = write_llama_gguf(tmp_path / "moe.gguf", layers=1, experts=4)
    assert open_gguf(path, allow_requantize=False).n_experts == 4


def test_any_shard_opens_the_set(tmp_path: Path) -> None:
    paths = split(tmp_path, 3)
    for path in paths:
        opened = open_gguf(path, allow_requantize=False)
        assert opened.files == tuple(paths)
        assert opened.name == "big"
        assert [tensor.name for tensor in opened.tensors] == [f"blk.{number}.attn_q.weight" for number in range(3)]
        assert opened.is_split


def test_missing_shards_are_named(tmp_path: Path) -> None:
    paths = split(tmp_path, 3)
    paths[1].unlink()
    with pytest.raises(InvalidDataError, match="1 of the 3 shards") as caught:
        open_gguf(paths[0], allow_requantize=False)
    assert paths[1].name in caught.value.why


def test_renamed_and_mixed_shards_are_refused(tmp_path: Path) -> None:
    paths = split(tmp_path, 2)
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(paths[0].read_bytes())
    with pytest.raises(InvalidDataError, match="name of its shard"):
        open_gguf(renamed, allow_requantize=False)
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(InvalidDataError, match="does not belong"):
        open_gguf(paths[0], allow_requantize=False)


def test_a_shard_name_without_shard_data_is_refused(tmp_path: Path) -> None:
    path = header_only(tmp_path / "m-00001-of-00002.gguf")
    with pytest.raises(InvalidDataError, match="name of its shard"):
        open_gguf(path, allow_requantize=False)


def test_one_of_one_is_whole(tmp_path: Path) -> None:
    path = header_only(tmp_path / "m-00001-of-00001.gguf")
    assert open_gguf(path, allow_requantize=False).name == "m"


def test_shard_names() -> None:
    assert shard_names(Path("/x/a.gguf")) == ("a.gguf",)
    assert shard_names(Path("/x/a-00002-of-00002.gguf")) == ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"general__type": "adapter"}, "adapter"),
        ({"adapter__type": "lora"}, "adapter"),
        ({"general__type": "mmproj"}, "projector"),
        ({"architecture": "clip"}, "projector"),
        ({"general__type": "imatrix", "architecture": None}, "importance matrix"),
        ({"imatrix__datasets": "x"}, "importance matrix"),
        ({"architecture": None}, "does not state its architecture"),
        ({"tensors": False}, "only a vocabulary"),
    ],
)
def test_what_is_no_model(tmp_path: Path, details: dict[str, object], said: str) -> None:
    path = header_only(tmp_path / "file.gguf", **details)  # type: ignore[arg-type]
    with pytest.raises(InvalidDataError, match=said) as caught:
        open_gguf(path, allow_requantize=True)
    assert caught.value.todo


def test_quantised_sources_need_permission(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    path = tmp_path / "q.gguf"
    writer = GGUFWriter(path, "llama")
    rows = quantize(np.ones((4, 64), np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", rows, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidDataError, match="already quantised") as caught:
        open_gguf(path, allow_requantize=False)
    assert caught.value.why == "its weights are Q8_0, and quantising again adds another error"
    assert "--allow-requantize" in caught.value.todo
    assert open_gguf(path, allow_requantize=True).is_quantised


@pytest.mark.parametrize(
    ("tensors", "seen"),
    [
        ({"output": ("Q8_0", 3), "blk.0.attn_q": ("BF16", 97)}, "3 % of its weights are Q8_0 (output.weight)"),
        ({"output": ("Q8_0", 1), "blk.0.attn_q": ("BF16", 400)}, "less than 1 % of its weights are Q8_0 (output.weight)"),
        (
            {"a": ("Q6_K", 1), "b": ("Q4_K", 2), "c": ("F16", 1)},
            "75 % of its weights are Q4_K and Q6_K (2 of 3 tensors)",
        ),
        ({"a": ("Q6_K", 1), "b": ("Q4_K", 2)}, "its weights are Q4_K and Q6_K"),
    ],
)
def test_what_of_a_model_is_quantised_is_said_as_it_is(tensors: dict[str, tuple[str, int]], seen: str, tmp_path: Path) -> None:
    """Every row has 256 elements; norms, of one dimension, do not count."""
    path = tmp_path / "m.gguf"
    weights = [NewTensor(f"{name}.weight", (256, rows), type_id(kind) or 0) for name, (kind, rows) in tensors.items()]
    write_zeros(path, [text_entry("general.architecture", "llama")], [*weights, NewTensor("output_norm.weight", (256,), 0)])
    with pytest.raises(InvalidDataError, match="already quantised") as caught:
        open_gguf(path, allow_requantize=False)
    assert caught.value.why == f"{seen}, and quantising again adds another error"


def test_the_first_shard_may_be_empty(tmp_path: Path) -> None:
    """llama-gguf-split --no-tensor-first-split puts all tensors after a first shard of metadata only."""
    paths = split(tmp_path, 2)
    content = paths[0].read_bytes()
    head = b"GGUF" + struct.pack("<IQ", 3, 0) + content[16:24]
    start, end = content.index(b"general.architecture") - 8, content.index(struct.pack("<Q", 19) + b"blk.0.attn_q.weight")
    counted = content[start:end].replace(
        b"split.tensors.count" + struct.pack("<Ii", 5, 2), b"split.tensors.count" + struct.pack("<Ii", 5, 1)
    )
    paths[0].write_bytes(head + counted)
    assert len(open_gguf(paths[0], allow_requantize=False).tensors) == 1


def test_native_types_are_named_with_the_option_that_keeps_them() -> None:
    def tensor(name: str, kind: str) -> TensorInfo:
        return TensorInfo(name, (32, 4), type_id(kind) or 0, kind, 0, 1)

    experts = [tensor(f"blk.{layer}.ffn_{part}_exps.weight", "MXFP4") for layer in (0, 1) for part in ("up", "down")]
    assert native_tensors([*experts, tensor("output.weight", "Q8_0")]) == experts
    assert keep_native(experts) == "--tensor-type _exps=mxfp4"
    dense = [tensor("blk.0.ffn_up.weight", "NVFP4"), tensor("blk.1.attn_q.weight", "NVFP4")]
    assert keep_native(dense) == r"--tensor-type '\.(attn_q|ffn_up)\.weight'=nvfp4"


@pytest.mark.parametrize("blocks", [5000, (1 << 32) - 1])
def test_a_block_count_that_no_model_has_is_refused(blocks: int, tmp_path: Path) -> None:
    """Loops over that many layers exhausted memory, and kept llama.cpp busy for seconds."""
    data = write_llama_gguf(tmp_path / "m.gguf", layers=1).read_bytes()
    key = b"llama.block_count"
    at = data.index(key) + len(key) + 4
    (tmp_path / "m.gguf").write_bytes(data[:at] + struct.pack("<I", blocks) + data[at + 4 :])
    with pytest.raises(InvalidDataError, match=f"announces {blocks} blocks"):
        open_gguf(tmp_path / "m.gguf", allow_requantize=False)
