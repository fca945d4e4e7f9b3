"""Quantised checkpoints are recognised by their weights and labelled by their configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from imatrix_runner.models.checkpoint_quantisation import checkpoint_quantisation
from imatrix_runner.models.safetensors_file import check_safetensors
from support.tiny_models import write_hf_directory, write_packed

BF16 = {"model.embed_tokens.weight": ("BF16", (64, 32)), "model.norm.weight": ("BF16", (32,))}
UP = "model.layers.0.mlp.up_proj"
FP8 = {f"{UP}.weight": ("F8_E4M3", (64, 32)), f"{UP}.weight_scale_inv": ("F32", (1, 1))}
GPTQ = {
    f"{UP}.qweight": ("I32", (4, 64)),
    f"{UP}.qzeros": ("I32", (1, 8)),
    f"{UP}.scales": ("F16", (1, 64)),
    f"{UP}.g_idx": ("I32", (32,)),
}
PACKED = {f"{UP}.weight_packed": ("I32", (64, 4)), f"{UP}.weight_scale": ("BF16", (64, 1)), f"{UP}.weight_shape": ("I64", (2,))}
BITNET = {f"{UP}.weight": ("U8", (16, 32)), f"{UP}.weight_scale": ("BF16", (1,))}
MXFP4 = {f"{UP}_blocks": ("U8", (2, 64, 1, 16)), f"{UP}_scales": ("U8", (2, 64, 1))}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def found(path: Path, tensors: Tensors, **files: Any) -> tuple[str, bool] | None:
    """The label, and whether the converter keeps the blocks. ``files``: JSON by stem; ``config`` is always present."""
    path.mkdir()
    for stem, content in {"config": {}, **files}.items():
        (path / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    write_packed(path / "model.safetensors", {**BF16, **tensors})
    quantisation = checkpoint_quantisation(path, check_safetensors(path))
    return (quantisation.label, quantisation.copied) if quantisation is not None else None


@pytest.mark.parametrize(
    ("tensors", "described", "label"),
    [
        (FP8, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        (GPTQ, {"quant_method": "gptq", "bits": 4}, "gptq, 4 bits"),
        (GPTQ, {"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        (PACKED, {"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors, pack-quantized"),
        (BITNET, {"quant_method": "bitnet"}, "bitnet"),
        ({f"{UP}.weight": ("F8_E4M3", (64, 32))}, {"quant_method": "modelopt", "quant_algo": "FP8"}, "modelopt, FP8"),
        (FP8, {"anything": "new"}, "an unnamed quantised format"),
    ],
)
@pytest.mark.parametrize("place", ["config", "text_config", "compression_config"])
def test_every_form_that_the_converter_would_unpack_is_named(
    tmp_path: Path, tensors: Tensors, described: dict[str, Any], label: str, place: str
) -> None:
    config: dict[str, Any] = {"quantization_config": described}
    if place == "text_config":
        config = {"text_config": config}
    elif place == "compression_config":
        config = {"compression_config": described}
    assert found(tmp_path / "m", tensors, config=config) == (label, False)


def test_files_of_other_tools_name_the_form_too(tmp_path: Path) -> None:
    assert found(tmp_path / "a", FP8, hf_quant_config={"quantization": {"quant_algo": "FP8"}}) == ("FP8", False)
    assert found(tmp_path / "b", FP8, params={"quantization": {"qformat_weight": "fp8_e4m3"}}) == ("fp8_e4m3", False)


def test_eight_bit_floats_need_no_configuration(tmp_path: Path) -> None:
    assert found(tmp_path / "m", {f"{UP}.weight": ("F8_E4M3", (640, 320))}) == ("F8_E4M3 weights", False)


def test_blocks_that_the_converter_copies_are_for_the_plan(tmp_path: Path) -> None:
    assert found(tmp_path / "m", MXFP4, config={"quantization_config": {"quant_method": "mxfp4"}}) == ("mxfp4", True)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"model.layers.0.attn.bias": ("BOOL", (1, 1, 64, 64))}, {"embeddings.position_ids": ("I64", (1, 512))}],
)
def test_an_original_is_not_taken_for_quantised(tmp_path: Path, tensors: Tensors) -> None:
    """Masks and positions are integer matrices as well."""
    assert found(tmp_path / "m", tensors) is None


def test_a_configuration_left_over_from_before_is_not_believed(tmp_path: Path) -> None:
    directory = write_hf_directory(tmp_path / "m", layers=1)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8"}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert checkpoint_quantisation(directory, check_safetensors(directory)) is None
