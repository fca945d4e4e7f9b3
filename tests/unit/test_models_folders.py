"""Folders given as a model are recognised, with advice. Every row of the table has at least one entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.folder_survey import Folder, survey
from imatrix_runner.models.model import model_name, parse_source
from imatrix_runner.models.model_folders import KINDS, check_folder, diagnose
from support.tiny_models import write_hf_directory, write_packed

LLAMA: Mapping[str, Any] = {"architectures": ["LlamaForCausalLM"]}
CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json")
BLOB = "blobs/sha256-" + "0f" * 32
Q_CONFIG = "quantization_config"
PACKED: Mapping[str, str] = {"a.packed": "U8"}


def folder(*files: str, config: Mapping[str, Any] = LLAMA, **more: Any) -> Folder:
    return Folder("/m", tuple(files), config if "config.json" in files else {}, **more)


def built(architecture: str) -> Folder:
    return folder(*CHECKPOINT, config={"architectures": [architecture]})


def compressed(kind: str, strategy: str) -> Folder:
    groups = {"group_0": {"weights": {"strategy": strategy}}}
    return quantised(quant_method="compressed-tensors", format=kind, config_groups=groups)


def quantised(dtypes: Mapping[str, str] | None = None, **announced: Any) -> Folder:
    return folder(*CHECKPOINT, config={**LLAMA, Q_CONFIG: announced}, dtypes=dtypes or PACKED)


# A folder, and what "what", "why" and "do" must name.
SEEN: list[tuple[Folder, str, str, str]] = [
    (folder(*CHECKPOINT, pointers=("model.safetensors",)), "Git LFS pointers", "model.safetensors only refers", "git lfs pull"),
    (folder("config.json", "model.safetensors.part"), "unfinished download", "model.safetensors.part", "finish"),
    (folder(*CHECKPOINT, "model.safetensors.aria2"), "unfinished download", "model.safetensors.aria2", "finish"),
    (folder("m.gguf.crdownload"), "unfinished download", "m.gguf.crdownload", "finish"),
    (folder("model_index.json", "unet/config.json"), "pipeline", "model_index.json", "language model"),
    (folder("adapter_config.json", "adapter_model.safetensors", base="org/base"), "adapter (LoRA)", "(org/base)", "Merge it"),
    (folder("adapter_model.safetensors"), "adapter (LoRA)", "adapter_model.safetensors only changes", "Merge it"),
    (folder("config.json", "adapter_model.bin", "tokenizer.json"), "adapter (LoRA)", "adapter_model.bin", "Merge it"),
    (
        folder("adapter_config.json", adapter={"base_model_name_or_path": "/home/me/base"}),
        "adapter (LoRA)",
        "(/home/me/base)",
        "Merge it",
    ),
    (quantised(quant_method="bitsandbytes", load_in_4bit=True), "with bitsandbytes", "the 4-bit weights", "BF16"),
    (quantised(load_in_8bit=True), "with bitsandbytes", "the 8-bit weights", "BF16"),
    (quantised(quant_method="awq", bits=4), "with AWQ", "cannot unpack the 4-bit", "made from"),
    (quantised(quant_method="gptq", bits=3), "with GPTQ", "not of 3", "made from"),
    (quantised({"a.qweight": "I32"}, quant_method="gptq", bits=4), "with GPTQ", "a.qweight has none", "made from"),
    (quantised(quant_method="exl2", bits=4.65), "with EXL2", "the 4.65-bit", "made from"),
    (quantised(quant_method="exl3"), "with EXL3", "cannot unpack", "made from"),
    (quantised(quant_method="hqq"), "with HQQ", "cannot unpack", "made from"),
    (quantised(quant_method="torchao"), "with torchao", "cannot unpack", "made from"),
    (quantised({"a.weight": "F8_E4M3"}, quant_method="fp8"), "with FP8", "the scales are missing: a.weight", "made from"),
    (
        quantised({"a.weight": "F8_E4M3", "a.weight_scale": "F32"}, quant_method="fp8"),
        "with FP8",
        "this one stores a.weight_scale",
        "made from",
    ),
    (
        quantised(
            quant_method="compressed-tensors",
            format="float-quantized",
            config_groups={"g": {"weights": {"strategy": "tensor"}}},
        ),
        "compressed-tensors (float-quantized)",
        "not per tensor",
        "made from",
    ),
    (
        quantised(quant_method="compressed-tensors", format="marlin-24", config_groups={"g": {"weights": {}}}),
        "compressed-tensors (marlin-24)",
        "does not know this format",
        "made from",
    ),
    (
        quantised(quant_method="compressed-tensors", format="pack-quantized", config_groups={"a": {}, "b": {}}),
        "compressed-tensors",
        "this one has 2",
        "made from",
    ),
    (
        folder(*CHECKPOINT, config={**LLAMA, "quantization": {"group_size": 64, "bits": 4}}, base="org/base", dtypes=PACKED),
        "with MLX",
        "MLX's 4-bit",
        "imatrix-runner run org/base",
    ),
    (
        folder(*CHECKPOINT, config={**LLAMA, "text_config": {Q_CONFIG: {"quant_method": "awq"}}}, dtypes=PACKED),
        "with AWQ",
        "cannot unpack",
        "",
    ),
    (quantised({"a.weight": "BF16"}, quant_method="awq"), "with AWQ", "in full precision", "Remove quantization_config"),
    (folder(*CHECKPOINT, config={Q_CONFIG: {"quant_method": "awq"}}, local=False), "with AWQ", "cannot unpack", ""),
    (folder(*CHECKPOINT, dtypes={"a.qweight": "I32"}), "with GPTQ or AWQ", "no quantization_config", ""),
    (folder(*CHECKPOINT, dtypes={"a.weight.quant_state.bitsandbytes__nf4": "U8"}), "with bitsandbytes", "cannot unpack", ""),
    (folder(BLOB, "manifests/x/y", blobs=(BLOB,)), "Ollama", "blobs", f"imatrix-runner run /m/{BLOB}"),
    (folder(BLOB), "Ollama", "blobs", "--modelfile"),
    (folder("models--org--name/snapshots/0/config.json"), "hub's cache", "snapshots/COMMIT", "run org/name --offline"),
    (
        Folder("/cache/models--org--my--name", ("snapshots/0/config.json",)),
        "hub's cache",
        "snapshots",
        "run org/my--name --offline",
    ),
    (folder("m-BF16.gguf", "m-Q8_0.gguf"), "not a Hugging Face", "m-BF16.gguf", "imatrix-runner run /m/m-BF16.gguf"),
    (folder("sub/deep/my m.gguf"), "not a Hugging Face", "sub/deep/my m.gguf", "run '/m/sub/deep/my m.gguf'"),
    (
        folder("config.json", "m-F16-00001-of-00002.gguf", "m-F16-00002-of-00002.gguf"),
        "not a Hugging Face",
        "m-F16-00001-of-00002.gguf",
        "run /m/m-F16-00001-of-00002.gguf",
    ),
    (folder("a-BF16.gguf", "b-BF16.gguf"), "several models", "a-BF16.gguf, b-BF16.gguf", "run /m/a-BF16.gguf"),
    (folder("a-Q2_K.gguf", "a-Q8_0.gguf"), "full precision", "a-Q2_K.gguf", "run /m/a-Q8_0.gguf --allow-requantize"),
    (folder("a-Q2_K.gguf", base="org/base"), "full precision", "a-Q2_K.gguf", "run org/base"),
    (folder("mmproj-F16.gguf", "m.imatrix.gguf"), "no language model", "mmproj-F16.gguf", "language model's own GGUF"),
    (folder("m.gguf.part1of2", "m.gguf.part2of2"), "in parts", "m.gguf.part1of2", "cat "),
    (folder("m.gguf-split-a"), "in parts", "m.gguf-split-a", "cat "),
    (folder("consolidated.safetensors", "params.json"), "Mistral's own format", "consolidated.safetensors", "--mistral-format"),
    (folder("config.json", "consolidated-00001-of-00002.safetensors"), "Mistral's own format", "consolidated-00001", ""),
    (folder("consolidated.00.pth", "params.json", "tokenizer.model"), "Meta's original", "consolidated.00.pth", "hub id"),
    (folder("config.json", "onnx/model.onnx"), "ONNX", "onnx/model.onnx", "made from"),
    (folder("config.json", "weights.00.npz"), "NumPy", "weights.00.npz", "made from"),
    (folder("config.json", "rank0.engine"), "TensorRT-LLM", "rank0.engine", "made from"),
    (folder("config.json", "openvino_model.xml", "openvino_model.bin"), "OpenVINO", "openvino_model", "made from"),
    (folder("model.litertlm"), "another program", "model.litertlm", "made from"),
    (folder("config.json", "tf_model.h5", "tokenizer.json"), "TensorFlow or JAX", "tf_model.h5", "safetensors"),
    (folder("config.json", "flax_model.msgpack"), "TensorFlow or JAX", "flax_model.msgpack", "safetensors"),
    (folder("global_step100/mp_rank_00_model_states.pt"), "training checkpoint", "mp_rank_00", "save_pretrained"),
    (folder("a/config.json", "b/config.json"), "contains some", "only in a, b", "imatrix-runner run /m/a"),
    (folder("config.json", "pytorch_model.bin", "tokenizer.json"), "only PyTorch pickles", "pytorch_model.bin", "safetensors"),
    (folder("config.json", "llama.safetensors"), "under a name", "llama.safetensors", "rename"),
    (folder("model.zip"), "archive", "model.zip", "Unpack"),
    (folder("config.json", "tokenizer.json"), "has no weights", "no model*.safetensors", "Download"),
    (folder("tokenizer.model"), "only a tokenizer", "tokenizer.model", "hub id"),
    (folder(), "is empty", "contains no files", ""),
    (folder("model.safetensors", "tokenizer.json"), "not a Hugging Face", "no config.json", "Download config.json"),
    (folder(*CHECKPOINT, config={"hidden_size": 8}), "not state its architecture", "no architectures", "Download"),
    (
        folder(*CHECKPOINT, config={"architectures": ["WhisperForConditionalGeneration"]}),
        "not a language model",
        "Whisper",
        "generates",
    ),
    (
        folder(*CHECKPOINT, config={"architectures": ["BertForTokenClassification"]}),
        "not a language model",
        "Bert",
        "generates",
    ),
    (folder("config.json", "model.safetensors", "vocab.json"), "half a tokenizer", "merges.txt", "Download"),
    (folder("config.json", "model.safetensors", "tokenizer_config.json"), "has no tokenizer", "tokenizer.json", "Download"),
]


@pytest.mark.parametrize(("given", "what", "why", "todo"), SEEN, ids=[str(number) for number in range(len(SEEN))])
def test_a_folder_is_explained(given: Folder, what: str, why: str, todo: str) -> None:
    error = diagnose(given)
    assert error is not None
    assert what in error.what
    assert error.what.startswith(given.name)
    assert why in error.why
    assert todo in error.todo
    assert not any("{" in text or "  " in text for text in (error.what, error.why, error.todo))


def test_every_row_is_seen_in_some_folder() -> None:
    def first(given: Folder) -> int:
        return next(
            number
            for number, kind in enumerate(KINDS)
            if (kind.where == "anywhere" or not given.has_weights) and kind.seen(given) is not None
        )

    assert {first(given) for given, *_ in SEEN} == set(range(len(KINDS)))


@pytest.mark.parametrize(
    "given",
    [
        folder(*CHECKPOINT),
        folder("config.json", "model.safetensors", "vocab.json", "merges.txt"),
        folder("config.json", "model.safetensors", "qwen.tiktoken"),
        folder("config.json", "model.safetensors", "rwkv_vocab_v20230424.txt"),
        folder("config.json", "model.safetensors", "tekken.json"),
        folder("config.json", "model-00001-of-00001.safetensors", "tokenizer.model", "pytorch_model.bin", "onnx/model.onnx"),
        folder("config.json", "model.safetensors", config={"architectures": ["MambaForCausalLM"]}),
        folder("config.json", "model.safetensors", config={"ssm_cfg": {"layer": "Mamba2"}}),
        folder(*CHECKPOINT, config={"text_config": {"architectures": ["LlamaForCausalLM"]}}),
        folder(*CHECKPOINT, "adapter_config.json", "m-Q4_0.gguf"),
        folder(*CHECKPOINT, "model.safetensors.tmp"),
        built("Qwen3ForSequenceClassification"),
        built("VitalForCausalLM"),
        quantised({"a.weight": "F8_E4M3", "a.weight_scale_inv": "F32"}, quant_method="fp8"),
        quantised({"a.qweight": "I32", "a.g_idx": "I32"}, quant_method="gptq", bits=4),
        quantised(quant_method="mxfp4"),
        quantised(quant_method="bitnet"),
        quantised(quant_method="somethingnew"),
        quantised(quant_method="compressed-tensors", format="nvfp4-pack-quantized", config_groups={"a": {}, "b": {}}),
        compressed("pack-quantized", "group"),
        compressed("float-quantized", "block"),
    ],
    ids=lambda given: f"{given.files[1:]}",
)
def test_a_folder_that_the_converter_takes(given: Folder) -> None:
    assert diagnose(given) is None


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": 3, "text_config": [], "architectures": "x", "quantization": "q"},
        {"quantization_config": {"quant_method": 7, "bits": []}, "architectures": [None]},
        {
            "architectures": ["X"],
            "quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1], "format": {}},
        },
        {"quantization_config": {"quant_method": "gptq"}, "architectures": {}},
        {"quantization": {"group_size": None, "bits": {}}, "architectures": ["X"]},
    ],
)
def test_odd_configurations_are_no_trouble(config: dict[str, Any]) -> None:
    diagnose(folder(*CHECKPOINT, config=config))


def test_braces_and_control_characters_in_names_are_harmless() -> None:
    error = diagnose(folder("a{0}\x1b[31m-BF16.gguf", "{seen}-BF16.gguf"))
    assert error is not None
    assert "a{0}\ufffd[31m-BF16.gguf" in error.why


def test_a_listing_of_a_real_folder(tmp_path: Path) -> None:
    for name in ("a/b/c/d/too-deep.gguf", "a/b/c/m.gguf", ".hidden/x.gguf", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("---\nbase_model: org/base\n---\n")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "other/base"}')
    (tmp_path / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    found = survey(tmp_path)
    assert found.files == ("README.md", "adapter_config.json", "tokenizer.json", "a/b/c/m.gguf")
    assert (found.base, found.pointers) == ("other/base", ("tokenizer.json",))


def test_ollamas_blobs_are_told_apart_by_content_and_size(tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for digit, content in (("1", b"{}"), ("2", b"GGUF" + bytes(10)), ("3", b"GGUF" + bytes(20))):
        (blobs / f"sha256-{digit * 64}").write_bytes(content)
    with pytest.raises(InvalidDataError) as caught:
        parse_source(str(tmp_path))
    assert caught.value.todo.endswith(f"imatrix-runner run {blobs}/sha256-{'3' * 64}")


def test_a_checkpoints_headers_are_looked_at_too(tmp_path: Path) -> None:
    directory = write_hf_directory(tmp_path / "m", layers=1)
    check_folder(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {Q_CONFIG: {"quant_method": "awq"}}))
    with pytest.raises(InvalidDataError, match="quantised with AWQ") as caught:
        check_folder(directory)
    assert "Remove quantization_config" in caught.value.todo
    write_packed(directory / "model.safetensors", {"model.layers.0.mlp.up_proj.qweight": ("I32", (4, 64))})
    with pytest.raises(InvalidDataError, match="quantised with AWQ") as caught:
        check_folder(directory)
    assert "made from" in caught.value.todo


def test_a_snapshot_is_called_after_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-0.6B" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    assert model_name(snapshot) == "Qwen3-0.6B"
    assert model_name(f"{snapshot}/") == "Qwen3-0.6B"
    monkeypatch.chdir(snapshot)
    assert model_name(".") == "Qwen3-0.6B"
    elsewhere = tmp_path / "snapshots" / "mine"
    elsewhere.mkdir(parents=True)
    assert model_name(elsewhere) == "mine"
