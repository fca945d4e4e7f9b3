"""Checks from a model's header what it can be used for: collecting an imatrix, measuring, loading at all.

Architectures have their names of llama.cpp's src/llama-arch.cpp. Which of them predict no next token follows from
``llama_model::create_memory`` and ``llama_model_has_encoder`` (src/llama-model.cpp).
"""

from __future__ import annotations

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.models.gguf_file import LongArray
from imatrix_runner.models.model import Model

_EMBEDDING = frozenset(
    (
        *("bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3", "eurobert"),
        *("gemma-embedding", "llama-embed", "t5encoder"),
    )
)
_DIFFUSION = frozenset(("dream", "llada", "llada-moe", "rnd1"))
_ENCODER_DECODER = frozenset(("t5",))
_DRAFT = frozenset(("eagle3", "dflash", "gemma4-assistant"))
_AUDIO = frozenset(("wavtokenizer-dec", "pockettts", "qwen3tts"))

_OWN_OUTPUT = ("qwen3vl",)
"""Architectures whose output tensor may have fewer rows than the vocabulary."""

_NO_VOCABULARY = ("none", "no_vocab")
_TOKENS = "tokenizer.ggml.tokens"
_WITHOUT = "Quantise it without an imatrix: --imatrix none, with levels that need none (Q8_0, Q6_K, Q4_K_M, IQ4_XS)."


def require_calibratable(model: Model) -> None:
    """Raise :class:`InvalidDataError` for a model from which llama.cpp cannot collect an imatrix."""
    if why := no_next_token(model):
        raise InvalidDataError(f"{model.name} cannot be calibrated", why, _WITHOUT)
    require_vocabulary(model)


def require_vocabulary(model: Model) -> None:
    """Raise :class:`InvalidDataError` for a model whose GGUF has no vocabulary to tokenise a text with."""
    if why := _no_text(model):
        again = "Convert the original model again with its tokenizer files"
        raise InvalidDataError(
            f"No text can be tokenised for {model.name}", why, f"{again}, or use --imatrix none or --imatrix FILE."
        )


def require_measurable(model: Model) -> None:
    """Raise :class:`InvalidDataError` for a model whose predictions cannot be compared with those of its levels."""
    pooling = model.header.integer(f"{model.architecture}.pooling_type")
    why = no_next_token(model) or _no_text(model)
    if not why and pooling:
        why = f"it computes embeddings ({model.architecture}.pooling_type is {pooling}) and is not trained to predict tokens"
    if why:
        raise InvalidDataError(
            f"{model.name} cannot be measured",
            why,
            "Omit --evaluate and the options that imply it: --text, --ab, --domain, --target-kld, --target-size.",
        )


def require_loadable(model: Model) -> None:
    """Raise :class:`InvalidDataError` if vocabulary and embeddings disagree: llama-quantize accepts such a model, but nothing
    can load it."""
    n_tokens = vocabulary_size(model)
    if n_tokens is None or model.architecture in _DRAFT | _AUDIO:
        return
    for tensor in model.tensors:
        own = tensor.name == "output.weight" and model.architecture in _OWN_OUTPUT
        if tensor.name not in ("token_embd.weight", "output.weight") or len(tensor.shape) != 2 or own:
            continue
        rows = tensor.shape[1]
        if rows != n_tokens:
            raise InvalidDataError(
                f"llama.cpp cannot load {model.name} or any level of it",
                f"its vocabulary has {n_tokens} tokens, and {tensor.name} has {rows} rows",
                "Convert the original model again with exactly its own tokenizer files (tokenizer.json or tokenizer.model, "
                "added_tokens.json, config.json).",
            )


def is_recurrent(model: Model) -> bool:
    """Whether some layers are recurrent; those compute every sequence separately."""
    return any(part in tensor.name for tensor in model.tensors for part in (".ssm_", ".shortconv.", ".time_mix_"))


def vocabulary_size(model: Model) -> int | None:
    """The number of tokens in the vocabulary, which is the number of logits per position; None without a vocabulary."""
    tokens = model.header.metadata.get(_TOKENS)
    if isinstance(tokens, LongArray):
        return tokens.length
    return len(tokens) if isinstance(tokens, tuple) else None


def no_next_token(model: Model) -> str:
    """Why a model does not predict the next token; empty if it does."""
    architecture = model.architecture
    causal = model.header.metadata.get(f"{architecture}.attention.causal")
    kinds = {
        "an embedding model": _EMBEDDING,
        "a diffusion model": _DIFFUSION,
        "an encoder-decoder model": _ENCODER_DECODER,
        "a draft head of another model": _DRAFT,
        "a component of a speech model": _AUDIO,
    }
    for kind, architectures in kinds.items():
        if architecture in architectures:
            return f"it is {kind} ({architecture}), which does not predict the next token of a text"
    if causal is False:
        return f"its attention is not causal ({architecture}.attention.causal is false), so it does not predict the next token"
    layers = model.n_layers or 0
    if layers and (model.header.integer(f"{architecture}.nextn_predict_layers") or 0) >= layers:
        return "it has only MTP / NextN blocks, which work on another model's hidden states"
    return ""


def _no_text(model: Model) -> str:
    """Why no text can be tokenised with the model's vocabulary; empty if it can."""
    kind = model.header.text("tokenizer.ggml.model")
    if kind in _NO_VOCABULARY:
        return f"it has no vocabulary (tokenizer.ggml.model is {kind})"
    if kind is None:
        return "its GGUF has no tokenizer (tokenizer.ggml.model is missing)"
    return f"its GGUF has no vocabulary ({_TOKENS} is missing)" if vocabulary_size(model) is None else ""
