"""The entries that an imatrix will hold once it is collected, read from the model's header.

llama-imatrix collects the weights of blocks that llama.cpp multiplies by while it computes a text
(tools/imatrix/imatrix.cpp, ``collect_imatrix``). Some weights of a block are never reached that way; the model's metadata shows
which. Architectures follow llama.cpp's ``src/models/*.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from imatrix_runner.imatrix.coverage import wants_weights
from imatrix_runner.models.model import Model

_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
_OUTPUT = "output.weight"

# hparams.n_layer_kv_from_start of src/models/gemma3n.cpp, which no metadata repeats.
_KV_LAYERS = {"gemma3n": 20}
# Metadata calls the last layers NextN ones, but the main graph computes them (src/models/granite-switch.cpp).
_NO_NEXTN = ("graniteswitch",)


@dataclass(frozen=True)
class ExpectedMatrix:
    """An imatrix before it exists. ``sizes``: entry name -> number of values; ``absent``: why a tensor gets no entry, a
    phrase for each; the other fields are what llama-quantize writes into a level's metadata."""

    sizes: Mapping[str, int]
    absent: Mapping[str, str]
    file_name: str = "imatrix.gguf"
    dataset: str | None = None
    chunks: int = 0


def expect(
    model: Model, *, process_output: bool = False, file_name: str = "imatrix.gguf", dataset: str | None = None, chunks: int = 0
) -> ExpectedMatrix:
    """Return what collecting from ``model`` will give."""
    absent = uncollected(model, process_output=process_output)
    sizes: dict[str, int] = {}
    for tensor in model.tensors:
        collected = wants_weights(tensor.name, tensor.shape) or tensor.name == _OUTPUT
        if collected and tensor.name not in absent:
            shape = (*tensor.shape, 1, 1)
            sizes[tensor.name] = shape[0] * shape[2]
    return ExpectedMatrix(sizes, absent, file_name, dataset, chunks)


def uncollected(model: Model, *, process_output: bool = False) -> dict[str, str]:
    """Return the matrices of a model that get no data from collecting, each with the reason as a phrase.

    Only what is certain from the header counts: a tensor that is missing here may still turn out to have no data.
    """
    found: dict[str, str] = {}
    for tensor in model.tensors:
        if len(tensor.shape) > 1 and (why := _why_uncollected(model, tensor.name, process_output=process_output)):
            found[tensor.name] = why
    return found


def _why_uncollected(model: Model, name: str, *, process_output: bool) -> str:
    if name == _OUTPUT:
        return "" if process_output else "data for the output is collected with --process-output only"
    match = _BLOCK.match(name)
    if match is None:
        return "data is collected for the weights of blocks only"
    block, part = int(match[1]), match[2]
    layers = model.n_layers
    if layers is None:
        return ""
    run = layers - nextn_layers(model)
    if block >= layers:
        return f"the model's metadata counts {layers} blocks, so this one is never computed"
    if block >= run:
        return "it belongs to an MTP / NextN block, which llama.cpp does not compute while it collects"
    if part.startswith("vis_"):
        return "it is a vision expert, which text never reaches"
    if part in ("attn_k.weight", "attn_v.weight") and block >= _own_kv_layers(model, layers):
        return "its block uses the keys and values of an earlier one"
    return ""


def nextn_layers(model: Model) -> int:
    """Return how many of the last blocks only predict further tokens (MTP, NextN)."""
    if model.architecture in _NO_NEXTN:
        return 0
    return model.header.integer(f"{model.architecture}.nextn_predict_layers") or 0


def _own_kv_layers(model: Model, layers: int) -> int:
    """Return how many layers, from the first, compute their own keys and values."""
    if model.architecture in _KV_LAYERS:
        return _KV_LAYERS[model.architecture]
    if model.architecture != "gemma4":
        return layers
    return layers - (model.header.integer("gemma4.attention.shared_kv_layers") or 0)
