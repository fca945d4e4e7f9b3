"""What a model's header tells of an imatrix that is still to be collected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest

from imatrix_runner.imatrix.expected import expect, uncollected
from imatrix_runner.models.gguf_file import GgufHeader, TensorInfo
from imatrix_runner.models.model import Model, Provenance

PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
KV = {"attn_k", "attn_v"}


def tensor(name: str, shape: tuple[int, ...] = (256, 64)) -> TensorInfo:
    return TensorInfo(name, shape, 1, "F16", 0, 2)


def model(architecture: str, layers: int, *further: str, **metadata: int) -> Model:
    """A header with ``layers`` blocks; ``metadata`` without the architecture's prefix, ``__`` for a dot."""
    keys = {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    names = [f"blk.{layer}.{part}.weight" for layer in range(layers) for part in PARTS]
    tensors = tuple(map(tensor, (*names, "token_embd.weight", "output.weight", *further)))
    found = MappingProxyType({"general.architecture": architecture, f"{architecture}.block_count": layers, **keys})
    header = GgufHeader(Path("m.gguf"), 3, 32, found, {}, tensors, 0, 0)
    return Model("m", (header.path,), header, tensors, 1, 1, architecture, Provenance("file", "m.gguf"))


def blocks_without(found: Model) -> dict[int, set[str]]:
    """Block -> parts that get no data."""
    absent: dict[int, set[str]] = {}
    for name in uncollected(found):
        if name.startswith("blk."):
            absent.setdefault(int(name.split(".")[1]), set()).add(name.split(".")[2])
    return absent


@pytest.mark.parametrize(
    ("found", "absent"),
    [
        (model("llama", 3), {}),
        (model("glm4moe", 3, nextn_predict_layers=1), {2: {*PARTS}}),
        (model("qwen35", 4, nextn_predict_layers=2), {2: {*PARTS}, 3: {*PARTS}}),
        (model("graniteswitch", 3, nextn_predict_layers=1), {}),  # its last block is a router, which is computed
        (model("gemma4", 4, attention__shared_kv_layers=3), {1: KV, 2: KV, 3: KV}),
        (model("gemma3n", 22), {20: KV, 21: KV}),
        (model("llama", 4, attention__shared_kv_layers=3), {}),
        (model("cogvlm", 1, "blk.0.vis_gate.weight"), {0: {"vis_gate"}}),
        (model("llama", 1, "blk.7.attn_q.weight"), {7: {"attn_q"}}),
    ],
    ids=lambda value: value.architecture if isinstance(value, Model) else "",
)
def test_weights_of_blocks_that_get_no_data(found: Model, absent: dict[int, set[str]]) -> None:
    assert blocks_without(found) == absent


@pytest.mark.parametrize("process_output", [True, False])
def test_the_output_gets_data_where_it_is_asked_for(process_output: bool) -> None:
    expected = expect(model("llama", 1), process_output=process_output)
    assert ("output.weight" in expected.sizes) is process_output
    assert ("output.weight" in expected.absent) is not process_output
    assert "token_embd.weight" in expected.absent


def test_experts_and_heads_have_a_value_for_each_of_their_columns() -> None:
    found = model("llama", 1)
    tensors = (tensor("blk.0.ffn_up_exps.weight", (256, 64, 8)), tensor("blk.0.ffn_norm.weight", (256,)))
    expected = expect(replace(found, tensors=tensors))
    assert expected.sizes == {"blk.0.ffn_up_exps.weight": 2048}


def test_a_model_without_a_count_of_blocks_is_taken_as_it_is() -> None:
    found = model("llama", 1)
    bare = replace(found, header=replace(found.header, metadata=MappingProxyType({})))
    assert blocks_without(bare) == {}
