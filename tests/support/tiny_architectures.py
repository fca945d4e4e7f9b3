"""Tiny real models of many architectures: llama.cpp loads, evaluates, measures and quantises every one of them.

Weights are random, with what a fresh network lacks and an importance matrix is about: columns of unequal size, one outlier
channel, experts of unequal popularity. Everything follows from ``(name, dtype, seed)`` alone, so two calls give the same bytes.
Names, shapes and metadata are those of llama.cpp's ``src/models/*.cpp`` and ``conversion/*.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from support.tiny_layers import (
    DENSE,
    EXPERTS,
    FF,
    HEAD,
    HEAD_SIZE,
    HEADLESS,
    HEADS,
    HIDDEN,
    KV_HEADS,
    MLA,
    MOE,
    RMS,
    ROPE,
    RWKV,
    SHORTCONV,
    SSM,
    SSM_DT_RANK,
    SSM_STATE,
    Tensors,
    Value,
    Weights,
    attention,
    experts,
    latent_attention,
    layer_norm,
    mamba_mixer,
    mlp,
    rwkv7_block,
    shared_expert,
    short_convolution,
)
from support.tiny_models import add_tensor, add_tokenizer, add_value, byte_level_bpe

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

DType = Literal["F32", "F16", "BF16"]

_VOCAB = 512
_FILE_TYPES: dict[DType, int] = {"F32": 0, "F16": 1, "BF16": 32}
_LOWER: dict[DType, Literal["f32", "f16", "bf16"]] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}

_ALWAYS_F32 = (
    *("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight", "shortconv.conv.weight", "ssm_a", "ssm_d"),
    *("time_mix_w1.weight", "time_mix_w2.weight", "time_mix_lerp_fused.weight"),
)
"""Ends of names of 2-D weights that llama.cpp's converter never stores in a smaller type."""


@dataclass(frozen=True)
class Architecture:
    """What sets a model apart: metadata without its architecture's prefix, and the tensors of each layer."""

    metadata: Mapping[str, Value]
    layer: Callable[[Weights, int], Tensors]
    arch: str = ""
    layers: int = 2
    vocab: int = _VOCAB
    tied: bool = False
    last: Callable[[Weights], Tensors] = lambda weights: {"output_norm.weight": weights.gains(HIDDEN)}


def write_architecture(name: str, path: Path, *, dtype: DType = "F32", seed: int = 1) -> Path:
    """A GGUF of the architecture ``name`` (one of :data:`ARCHITECTURES`), at most 20 MB, with the byte-level BPE tokenizer of
    :mod:`support.tiny_models`. What the converter keeps in F32 (norms, routers, convolutions) stays so. Returns ``path``.
    """
    from gguf import GGUFWriter

    model = {**_TABLE, **_SPECIAL}[name]
    tokens, merges = byte_level_bpe(min(model.vocab, _VOCAB))
    tokens += [f"<unused{number}>" for number in range(model.vocab - len(tokens))]  # no merge leads there: never in a text
    arch = model.arch or name
    writer = GGUFWriter(path, arch)
    writer.add_name("tiny")  # by some names (phi3) llama.cpp knows a family, and then fails without its special tokens
    writer.add_type("model")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(model.layers)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(_FILE_TYPES[dtype])
    for key, value in model.metadata.items():
        _add_metadata(writer, key if key.startswith("tokenizer.") else f"{arch}.{key}", value)
    add_tokenizer(writer, tokens, merges)
    for tensor, array in _tensors(model, len(tokens), Weights(seed)):
        kept = array.ndim == 1 or tensor.endswith(_ALWAYS_F32)
        add_tensor(writer, tensor, array, "f32" if kept else _LOWER[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        add_value(writer, key, value)


def _tensors(model: Architecture, vocab: int, weights: Weights) -> Iterator[tuple[str, Array]]:
    yield "token_embd.weight", weights.embeddings(vocab)
    for number in range(model.layers):
        for name, array in model.layer(weights, number).items():
            yield f"blk.{number}.{name}", array
    yield from model.last(weights).items()
    if not model.tied:
        yield "output.weight", 2 * weights(vocab, HIDDEN)  # logits of deviation 2: some tokens are likelier than others


# Layers of each architecture.


def _llama(w: Weights, _: int) -> Tensors:
    return attention(w) | mlp(w)


def _mixtral(w: Weights, _: int) -> Tensors:
    return attention(w) | experts(w, slope=0.25)


def _qwen3(w: Weights, _: int) -> Tensors:
    return attention(w, qk_norm=True) | mlp(w)


def _qwen3moe(w: Weights, _: int) -> Tensors:
    return attention(w, qk_norm=True) | experts(w, slope=1.5)


def _gemma3(w: Weights, _: int) -> Tensors:
    norms = {"post_attention_norm.weight": w.gains(HIDDEN), "post_ffw_norm.weight": w.gains(HIDDEN)}
    return attention(w, qk_norm=True) | mlp(w) | norms


def _phi3(w: Weights, _: int) -> Tensors:
    return {
        "attn_norm.weight": w.gains(HIDDEN),
        "attn_qkv.weight": w((HEADS + 2 * KV_HEADS) * HEAD, HIDDEN),
        "attn_output.weight": w.back(HIDDEN, HIDDEN),
        "ffn_norm.weight": w.gains(HIDDEN),
        "ffn_up.weight": w(2 * FF, HIDDEN),  # gate, then up
        "ffn_down.weight": w.back(HIDDEN, FF),
    }


def _deepseek2(w: Weights, number: int) -> Tensors:
    return latent_attention(w) | (mlp(w) if number == 0 else experts(w, slope=0.25) | shared_expert(w))


def _mamba(w: Weights, _: int) -> Tensors:
    return mamba_mixer(w)


def _jamba(w: Weights, number: int) -> Tensors:
    """First a Mamba layer with a dense feed-forward part, then attention with experts."""
    if number == 1:
        return attention(w) | experts(w, slope=0.25, count=4)
    norms = {"ssm_dt": SSM_DT_RANK, "ssm_b": SSM_STATE, "ssm_c": SSM_STATE}
    return mamba_mixer(w) | {f"{name}_norm.weight": w.gains(size) for name, size in norms.items()} | mlp(w)


def _glm4moe(w: Weights, number: int) -> Tensors:
    """Two dense blocks, then a NextN block with experts, which llama.cpp loads and does not compute."""
    tensors = attention(w) | (mlp(w) if number < 2 else experts(w, slope=0.25))
    tensors["post_attention_norm.weight"] = tensors.pop("ffn_norm.weight")
    if number < 2:
        return tensors
    tensors |= {"exp_probs_b.bias": w.around(0, EXPERTS), "nextn.eh_proj.weight": w(HIDDEN, 2 * HIDDEN)}
    return tensors | {f"nextn.{name}.weight": w.gains(HIDDEN) for name in ("enorm", "hnorm", "shared_head_norm")}


def _bert(w: Weights, _: int) -> Tensors:
    tensors = attention(w) | {"ffn_up.weight": w(FF, HIDDEN), "ffn_down.weight": w.back(HIDDEN, FF)}
    del tensors["attn_norm.weight"]
    return tensors | layer_norm(w, "attn_output_norm") | layer_norm(w, "layer_output_norm")


def _bert_last(w: Weights) -> Tensors:
    return layer_norm(w, "token_embd_norm") | {"position_embd.weight": w(2048, HIDDEN), "token_types.weight": w(2, HIDDEN)}


def _lfm2(w: Weights, number: int) -> Tensors:
    return (attention(w, qk_norm=True) if number == 1 else short_convolution(w)) | mlp(w)


def _rwkv7_last(w: Weights) -> Tensors:
    return layer_norm(w, "token_embd_norm") | layer_norm(w, "output_norm")


def _lfm2_last(w: Weights) -> Tensors:
    return {"token_embd_norm.weight": w.gains(HIDDEN)}  # in spite of its name, what stands before the output


_TABLE: dict[str, Architecture] = {
    "llama": Architecture(DENSE | ROPE, _llama),
    "qwen3": Architecture(DENSE | ROPE | HEAD_SIZE, _qwen3),
    "gemma3": Architecture(
        # One layer that slides, then one that sees everything.
        DENSE | ROPE | HEAD_SIZE | {"attention.sliding_window": 32, "attention.sliding_window_pattern": 2},
        _gemma3,
        vocab=16_000,
        tied=True,
    ),
    "phi3": Architecture(DENSE | ROPE, _phi3),
    "qwen3moe": Architecture(DENSE | ROPE | HEAD_SIZE | MOE | {"expert_feed_forward_length": FF}, _qwen3moe),
    "mixtral": Architecture(DENSE | ROPE | MOE, _mixtral, arch="llama"),
    "deepseek2": Architecture(
        DENSE | MLA | MOE | {"leading_dense_block_count": 1, "expert_feed_forward_length": FF, "expert_shared_count": 1},
        _deepseek2,
    ),
    "mamba": Architecture(RMS | HEADLESS | SSM | {"feed_forward_length": 0}, _mamba),
    "rwkv7": Architecture(HEADLESS | RWKV, lambda w, _: rwkv7_block(w), last=_rwkv7_last),
    # No K/V heads in a layer say that it is a recurrent one.
    "lfm2": Architecture(
        DENSE | ROPE | {"attention.head_count_kv": [0, KV_HEADS, 0], "shortconv.l_cache": SHORTCONV},
        _lfm2,
        layers=3,
        tied=True,
        last=_lfm2_last,
    ),
    "jamba": Architecture(DENSE | SSM | MOE | {"attention.head_count_kv": [0, KV_HEADS], "expert_count": 4}, _jamba),
}

_SPECIAL: dict[str, Architecture] = {
    "glm4moe": Architecture(
        DENSE
        | ROPE
        | MOE
        | {
            "nextn_predict_layers": 1,
            "leading_dense_block_count": 2,
            "expert_feed_forward_length": FF,
            "expert_shared_count": 0,
        },
        _glm4moe,
        layers=3,
    ),
    "bert": Architecture(
        DENSE | {"attention.layer_norm_epsilon": 1e-5, "attention.causal": False, "tokenizer.ggml.token_type_count": 2},
        _bert,
        tied=True,
        last=_bert_last,
    ),
}
"""Models with weights that computing a text does not reach, or that predict no text at all; :func:`write_architecture` knows
them too."""

ARCHITECTURES: tuple[str, ...] = tuple(_TABLE)
"""What :func:`write_architecture` can write. ``mamba`` and ``rwkv7`` are recurrent, ``lfm2`` and ``jamba`` hybrid."""
