"""A tiny model whose layers have one tensor type each, so that computing it multiplies every kind of weight.

Processors differ in the kernels that llama.cpp uses for a type, and some builds of them are wrong: a library that loads, and
multiplies F16 matrices, may still crash with Q4_K ones, with several sequences at once, or with one token alone. So a library
or program computes this model once before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

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

Architecture = Literal["jamba", "llama"]

PROOF_CONTEXT = 12
"""Tokens of a sequence: several, as matrix kernels require, and in two sequences fewer than the 32 from which work is offloaded
to a GPU."""

PROOF_TEXT = "A proof is a text that nobody has to believe. " * 4
"""One token per byte: :data:`PROOF_CHUNKS` chunks and one more, as llama-imatrix requires."""

PROOF_CHUNKS = 8

_FLOATS = ("F32", "F16", "BF16")
# Block types, and where a block has its 16-bit factors (ggml-common.h); all other bytes can have any value. The second number
# is the factor's share: an offset is chosen so that random codes give weights around zero.
BLOCK_FACTORS: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1),),
    "Q4_1": ((0, 1), (2, -7.5)),
    "Q5_0": ((0, 1),),
    "Q5_1": ((0, 1), (2, -15.5)),
    "Q8_0": ((0, 1),),
    "Q2_K": ((80, 1), (82, 1.5)),
    "Q3_K": ((108, 1),),
    "Q4_K": ((0, 1), (2, 7.5)),
    "Q5_K": ((0, 1), (2, 15.5)),
    "Q6_K": ((208, 1),),
    "IQ4_NL": ((0, 1),),
    "IQ4_XS": ((0, 1),),
    "IQ3_S": ((0, 1),),
    "IQ2_XXS": ((0, 1),),
}
PROOF_TYPES = (*_FLOATS, *BLOCK_FACTORS)

_WIDTH = 256  # one block of the largest types
_HEADS, _KV_HEADS = 4, 1
_EXPERTS = 2
_INNER, _STATE, _STEPS, _CONVOLUTION = 2 * _WIDTH, 16, 32, 4  # of Mamba layers
_SPREAD = 1 / 16  # so that a product is about as large as its operands


def write_proof_model(path: Path, architecture: Architecture = "jamba") -> Path:
    """Write the model, the same bytes every time, and return ``path``. Raises :class:`RunnerError` for errors of the disk.

    ``jamba`` has for every type an attention layer with experts (MUL_MAT_ID) and a Mamba layer, whose weights are multiplied
    with all sequences at once (a third dimension): 22 MB. ``llama`` is the first half, for programs from before Jamba.
    """
    try:
        _write(path, architecture)
    except OSError as error:
        raise from_os_error(error, "writing the model that is multiplied with first", path) from error
    return path


def _write(path: Path, architecture: Architecture) -> None:
    layers = [(kind, mixer) for kind in PROOF_TYPES for mixer in (("mamba", "attention") if architecture == "jamba" else ("",))]
    tensors = list(_tensors(layers, np.random.default_rng(0)))
    write_gguf_file(path, _metadata(architecture, layers), [tensor for tensor, _ in tensors], (data for _, data in tensors))


def _metadata(architecture: Architecture, layers: Sequence[tuple[str, str]]) -> Iterator[bytes]:
    tokens = byte_tokens()
    yield text_entry("general.architecture", architecture)
    yield text_entry("general.name", "proof")
    yield integer_entry(f"{architecture}.context_length", 2048)
    yield integer_entry(f"{architecture}.embedding_length", _WIDTH)
    yield integer_entry(f"{architecture}.block_count", len(layers))
    yield integer_entry(f"{architecture}.feed_forward_length", _WIDTH)
    yield integer_entry(f"{architecture}.attention.head_count", _HEADS)
    heads = [0 if mixer == "mamba" else _KV_HEADS for _, mixer in layers]
    yield integers_entry(f"{architecture}.attention.head_count_kv", heads)
    yield integer_entry(f"{architecture}.rope.dimension_count", _WIDTH // _HEADS)
    yield float_entry(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    yield integer_entry(f"{architecture}.expert_count", _EXPERTS)
    yield integer_entry(f"{architecture}.expert_used_count", _EXPERTS)
    yield integer_entry(f"{architecture}.ssm.conv_kernel", _CONVOLUTION)
    yield integer_entry(f"{architecture}.ssm.inner_size", _INNER)
    yield integer_entry(f"{architecture}.ssm.state_size", _STATE)
    yield integer_entry(f"{architecture}.ssm.time_step_rank", _STEPS)
    yield integer_entry(f"{architecture}.vocab_size", len(tokens))
    yield text_entry("tokenizer.ggml.model", "gpt2")
    yield text_entry("tokenizer.ggml.pre", "gpt-2")
    yield texts_entry("tokenizer.ggml.tokens", tokens)
    yield texts_entry("tokenizer.ggml.merges", [f"{tokens[0]} {tokens[1]}"])
    yield integers_entry("tokenizer.ggml.token_type", [1] * len(tokens))
    yield flag_entry("tokenizer.ggml.add_bos_token", value=False)


def _tensors(layers: Sequence[tuple[str, str]], draw: np.random.Generator) -> Iterator[tuple[NewTensor, npt.NDArray[Any]]]:
    """Yield every tensor and its data, drawn in this order."""
    n_tokens = len(byte_tokens())
    yield _plain("token_embd.weight", draw.standard_normal((n_tokens, _WIDTH), np.float32))
    yield _plain("output_norm.weight", np.ones(_WIDTH, np.float32))
    yield _weight("output.weight", "Q6_K", draw, (n_tokens, _WIDTH))
    for number, (kind, mixer) in enumerate(layers):
        for name, array in _mamba_constants(draw) if mixer == "mamba" else _router(draw):
            yield _plain(f"blk.{number}.{name}", array)
        for name, shape in _MAMBA if mixer == "mamba" else _ATTENTION:
            yield _weight(f"blk.{number}.{name}.weight", kind, draw, shape)


_MAMBA = (
    ("ssm_in", (2 * _INNER, _WIDTH)),
    ("ssm_x", (_STEPS + 2 * _STATE, _INNER)),
    ("ssm_out", (_WIDTH, _INNER)),
    *((name, (_WIDTH, _WIDTH)) for name in ("ffn_gate", "ffn_up", "ffn_down")),
)
_ATTENTION = (
    *((name, (_WIDTH, _WIDTH)) for name in ("attn_q", "attn_output")),
    *((name, (_WIDTH // _HEADS * _KV_HEADS, _WIDTH)) for name in ("attn_k", "attn_v")),
    *((name, (_EXPERTS, _WIDTH, _WIDTH)) for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")),
)


def _router(draw: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    yield "attn_norm.weight", np.ones(_WIDTH, np.float32)
    yield "ffn_norm.weight", np.ones(_WIDTH, np.float32)
    yield "ffn_gate_inp.weight", draw.standard_normal((_EXPERTS, _WIDTH), np.float32) * np.float32(_SPREAD)


def _mamba_constants(draw: np.random.Generator) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """Yield the tensors of a Mamba layer that stay F32, initialised as in its paper."""
    yield "attn_norm.weight", np.ones(_WIDTH, np.float32)
    yield "ffn_norm.weight", np.ones(_WIDTH, np.float32)
    yield "ssm_conv1d.weight", draw.standard_normal((_INNER, _CONVOLUTION), np.float32) / np.float32(2)
    yield "ssm_conv1d.bias", np.zeros(_INNER, np.float32)
    for name, size in (("ssm_dt_norm", _STEPS), ("ssm_b_norm", _STATE), ("ssm_c_norm", _STATE)):
        yield f"{name}.weight", np.ones(size, np.float32)
    yield "ssm_dt.weight", draw.standard_normal((_INNER, _STEPS), np.float32) / np.float32(_STEPS)
    yield "ssm_dt.bias", np.full(_INNER, -2, np.float32)
    yield "ssm_a", -np.tile(np.arange(1, _STATE + 1, dtype=np.float32), (_INNER, 1))
    yield "ssm_d", np.ones(_INNER, np.float32)


def _plain(name: str, array: npt.NDArray[np.float32]) -> tuple[NewTensor, npt.NDArray[Any]]:
    return NewTensor(name, array.shape[::-1], _type("F32")), array.astype("<f4", copy=False)


def _weight(name: str, kind: str, draw: np.random.Generator, shape: tuple[int, ...]) -> tuple[NewTensor, npt.NDArray[Any]]:
    """Return random numbers as a tensor of one type; ``shape`` has the row length last."""
    tensor = NewTensor(name, shape[::-1], _type(kind))
    if kind in BLOCK_FACTORS:
        return tensor, _blocks(kind, draw, shape)
    values = draw.standard_normal(shape, np.float32) * np.float32(_SPREAD)
    if kind == "BF16":
        return tensor, (values.view(np.uint32) >> 16).astype("<u2")
    return tensor, values.astype("<f2" if kind == "F16" else "<f4")


def _type(kind: str) -> int:
    number = type_id(kind)
    assert number is not None
    return number


def _blocks(kind: str, draw: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Blocks of random bytes, uint8 [blocks, bytes of a block], with factors that give the desired spread of weights."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    block = type_size(_type(kind))
    assert block is not None
    size, n_bytes = block
    blocks = draw.integers(0, 256, (int(np.prod(shape)) // size, n_bytes), np.uint8)
    _set_factors(blocks, kind, 1.0)
    sample = blocks[: 8 * _WIDTH // size]
    _set_factors(blocks, kind, _SPREAD / float(dequantize(sample, GGMLQuantizationType[kind]).std()))
    return blocks


def _set_factors(blocks: npt.NDArray[np.uint8], kind: str, value: float) -> None:
    for offset, share in BLOCK_FACTORS[kind]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value * share).tobytes(), np.uint8)


def byte_tokens() -> list[str]:
    """The 256 letters that stand for bytes in GPT-2's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + index) for index, byte in enumerate(others)}}
    return [letters[byte] for byte in range(256)]
