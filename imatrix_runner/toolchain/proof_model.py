"""A tiny model whose layers have one tensor type each: what computes it has multiplied with every kind of weight.

Processors differ in which kernels llama.cpp takes for which type, and some builds of them are wrong: a library that loads, and
multiplies F16 matrices, may still crash with Q4_K ones, with several sequences at once, or with one token alone. So this is
computed once before anything is trusted to compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import from_os_error

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

Architecture = Literal["jamba", "llama"]

PROOF_CONTEXT = 12
"""Tokens of a sequence: several, as matrix kernels want them, and in two sequences fewer than are offloaded to a GPU (32)."""

PROOF_TEXT = "A proof is a text that nobody has to believe. " * 4
"""A token each byte: :data:`PROOF_CHUNKS` chunks and one more, as llama-imatrix wants it."""

PROOF_CHUNKS = 8

_FLOATS = ("F32", "F16", "BF16")
# Block types, and where in a block its 16-bit factors lie (ggml-common.h); all other bytes may be anything. The second number
# is the factor's share: an offset is chosen so that random codes give weights around zero.
_QUANTISED: dict[str, tuple[tuple[int, float], ...]] = {
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
PROOF_TYPES = (*_FLOATS, *_QUANTISED)

_WIDTH = 256  # one block of the largest types
_HEADS, _KV_HEADS = 4, 1
_EXPERTS = 2
_INNER, _STATE, _STEPS, _CONVOLUTION = 2 * _WIDTH, 16, 32, 4  # of Mamba layers
_SPREAD = 1 / 16  # so that a product has about the size of what was multiplied


def write_proof_model(path: Path, architecture: Architecture = "jamba") -> Path:
    """Write the model, the same bytes every time, and return ``path``. Trouble with the disk becomes an error of ours.

    ``jamba`` has for every type an attention layer with experts (MUL_MAT_ID) and a Mamba layer, whose weights are multiplied
    with all sequences at once (a third dimension): 22 MB. ``llama`` is the first half, for programs from before Jamba.
    """
    try:
        _write(path, architecture)
    except OSError as error:
        raise from_os_error(error, "writing the model that is multiplied with first", path) from error
    return path


def _write(path: Path, architecture: Architecture) -> None:
    from gguf import GGUFWriter

    draw = np.random.default_rng(0)
    layers = [(kind, mixer) for kind in PROOF_TYPES for mixer in (("mamba", "attention") if architecture == "jamba" else ("",))]
    tokens = _byte_tokens()
    writer = GGUFWriter(path, architecture)
    writer.add_name("proof")
    writer.add_context_length(2048)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(_WIDTH)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv([0 if mixer == "mamba" else _KV_HEADS for _, mixer in layers])
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(_EXPERTS)
    writer.add_expert_used_count(_EXPERTS)
    writer.add_ssm_conv_kernel(_CONVOLUTION)
    writer.add_ssm_inner_size(_INNER)
    writer.add_ssm_state_size(_STATE)
    writer.add_ssm_time_step_rank(_STEPS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges([f"{tokens[0]} {tokens[1]}"])
    writer.add_token_types([1] * len(tokens))
    writer.add_add_bos_token(False)
    writer.add_tensor("token_embd.weight", draw.standard_normal((len(tokens), _WIDTH), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(_WIDTH, np.float32))
    _add_weight(writer, "output.weight", "Q6_K", draw, (len(tokens), _WIDTH))
    for number, (kind, mixer) in enumerate(layers):
        for name, array in _mamba_constants(draw) if mixer == "mamba" else _router(draw):
            writer.add_tensor(f"blk.{number}.{name}", array)
        for name, shape in _MAMBA if mixer == "mamba" else _ATTENTION:
            _add_weight(writer, f"blk.{number}.{name}.weight", kind, draw, shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
    """What stays F32 in a Mamba layer, as its paper initialises it."""
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


def _add_weight(writer: GGUFWriter, name: str, kind: str, draw: np.random.Generator, shape: tuple[int, ...]) -> None:
    """Random numbers as a tensor of one type."""
    from gguf import GGMLQuantizationType

    dtype = GGMLQuantizationType[kind]
    if kind in _QUANTISED:
        writer.add_tensor(name, _blocks(kind, dtype, draw, shape), raw_dtype=dtype)
        return
    values = draw.standard_normal(shape, np.float32) * np.float32(_SPREAD)
    if kind == "BF16":
        writer.add_tensor(name, (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), raw_dtype=dtype)
    else:
        writer.add_tensor(name, values.astype(np.float16 if kind == "F16" else np.float32))


def _blocks(kind: str, dtype: GGMLQuantizationType, draw: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Blocks of random bytes, uint8 [..., bytes of a row], with factors that give weights of the wanted spread."""
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    size, n_bytes = GGML_QUANT_SIZES[dtype]
    blocks = draw.integers(0, 256, (int(np.prod(shape)) // size, n_bytes), np.uint8)
    _set_factors(blocks, kind, 1.0)
    sample = blocks[: 8 * _WIDTH // size]
    _set_factors(blocks, kind, _SPREAD / float(dequantize(sample, dtype).std()))
    return blocks.reshape(*shape[:-1], shape[-1] // size * n_bytes)


def _set_factors(blocks: npt.NDArray[np.uint8], kind: str, value: float) -> None:
    for offset, share in _QUANTISED[kind]:
        blocks[:, offset : offset + 2] = np.frombuffer(np.float16(value * share).tobytes(), np.uint8)


def _byte_tokens() -> list[str]:
    """The 256 letters that stand for bytes in GPT-2's vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + index) for index, byte in enumerate(others)}}
    return [letters[byte] for byte in range(256)]
