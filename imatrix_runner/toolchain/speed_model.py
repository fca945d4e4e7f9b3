"""A model whose weights all have one type, to time that type with: a few layers of ordinary shape, larger than caches are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import from_os_error
from imatrix_runner.models.ggml_types import type_id, type_size
from imatrix_runner.models.gguf_writer import (
    NewTensor,
    flag_entry,
    float_entry,
    integer_entry,
    integers_entry,
    text_entry,
    texts_entry,
    write_gguf_file,
)
from imatrix_runner.toolchain.proof_model import BLOCK_FACTORS, byte_tokens

_SEED = 2
_HEAD = 128
_CONTEXT = 2048
_DRAWN = 1 << 20
"""Numbers that are drawn; the rest repeats them. Every repetition lies in memory of its own."""
_FACTOR = 2.0**-10
_WITHOUT_FACTOR = ("IQ1_M",)


@dataclass(frozen=True)
class SpeedShape:
    """``width`` of the rows, ``inner`` rows of a feed-forward matrix, ``layers``: by default 134 million weights, 35 MB or
    more."""

    width: int = 2048
    inner: int = 8192
    layers: int = 2

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> shape, in ggml order, of every matrix of a layer."""
        square, wide = (self.width, self.width), (self.width, self.inner)
        attention = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
        return {**attention, "ffn_gate": wide, "ffn_up": wide, "ffn_down": (self.inner, self.width)}

    @property
    def n_weights(self) -> int:
        """Weights that are multiplied for each token."""
        return self.layers * sum(map(prod, self.matrices.values())) + self.width * len(byte_tokens())


def write_speed_model(path: Path, kind: str, shape: SpeedShape) -> None:
    """Write the model with weights of the type ``kind``. Raises :class:`RunnerError` for errors of the disk."""
    number = type_id(kind)
    assert number is not None
    tokens = len(byte_tokens())
    norm = type_id("F32") or 0
    tensors = [
        NewTensor("token_embd.weight", (shape.width, tokens), norm),
        NewTensor("output_norm.weight", (shape.width,), norm),
        NewTensor("output.weight", (shape.width, tokens), number),
    ]
    for layer in range(shape.layers):
        tensors += [NewTensor(f"blk.{layer}.{name}.weight", (shape.width,), norm) for name in ("attn_norm", "ffn_norm")]
        tensors += [NewTensor(f"blk.{layer}.{name}.weight", size, number) for name, size in shape.matrices.items()]
    try:
        write_gguf_file(path, _metadata(shape), tensors, _data(tensors, kind))
    except OSError as error:
        raise from_os_error(error, "writing a model to time a type with", path) from error


def _metadata(shape: SpeedShape) -> Iterator[bytes]:
    tokens = byte_tokens()
    yield text_entry("general.architecture", "llama")
    yield text_entry("general.name", "speed")
    yield integer_entry("llama.context_length", _CONTEXT)
    yield integer_entry("llama.embedding_length", shape.width)
    yield integer_entry("llama.block_count", shape.layers)
    yield integer_entry("llama.feed_forward_length", shape.inner)
    yield integer_entry("llama.attention.head_count", max(1, shape.width // _HEAD))
    yield float_entry("llama.attention.layer_norm_rms_epsilon", 1e-5)
    yield integer_entry("llama.vocab_size", len(tokens))
    yield text_entry("tokenizer.ggml.model", "gpt2")
    yield text_entry("tokenizer.ggml.pre", "gpt-2")
    yield texts_entry("tokenizer.ggml.tokens", tokens)
    yield texts_entry("tokenizer.ggml.merges", [f"{tokens[0]} {tokens[1]}"])
    yield integers_entry("tokenizer.ggml.token_type", [1] * len(tokens))
    yield flag_entry("tokenizer.ggml.add_bos_token", value=False)


def _data(tensors: list[NewTensor], kind: str) -> Iterator[npt.NDArray[Any]]:
    random = np.random.default_rng(_SEED)
    plain = random.standard_normal(_DRAWN, np.float32) * np.float32(_FACTOR)
    drawn = _drawn(kind, random, plain)
    for tensor in tensors:
        source = plain.view(np.uint8) if tensor.type == type_id("F32") else drawn
        yield np.resize(source, tensor.n_bytes)


def _drawn(kind: str, random: np.random.Generator, plain: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The bytes of :data:`_DRAWN` numbers of a type."""
    if kind == "F32":
        return plain.view(np.uint8)
    if kind == "F16":
        return plain.astype("<f2").view(np.uint8)
    if kind == "BF16":
        return (plain.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    size = type_size(type_id(kind) or 0)
    assert size is not None
    blocks = random.integers(0, 256, (_DRAWN // size[0], size[1]), np.uint8)
    factors = () if kind in _WITHOUT_FACTOR else BLOCK_FACTORS.get(kind, ((0, 1.0),))
    for offset, share in factors:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(_FACTOR * share).tobytes(), np.uint8)
    return blocks.reshape(-1)
