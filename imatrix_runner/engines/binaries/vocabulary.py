"""Facts about a model's vocabulary that llama.cpp's programs need as options, read from its header."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.engines.llama_cpp.flags import ADD_END
from imatrix_runner.models.gguf_file import LongArray, read_header


def n_tokens(model: Path) -> int | None:
    """Return the size of a model's vocabulary; None if the model has no tokenizer."""
    tokens = read_header(model).metadata.get("tokenizer.ggml.tokens")
    return tokens.length if isinstance(tokens, LongArray) else len(tokens) if isinstance(tokens, tuple) else None


def ends_texts(model: Path) -> bool:
    """Return whether the vocabulary ends every text with a token."""
    return read_header(model).metadata.get(ADD_END) is True


def end_token(model: Path) -> int | None:
    """Return the token that ends every text; None if the vocabulary adds none."""
    header = read_header(model)
    return header.integer("tokenizer.ggml.eos_token_id") if header.metadata.get(ADD_END) is True else None
