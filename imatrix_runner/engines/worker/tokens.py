"""Tokenises texts with a model's vocabulary, the calibration text exactly as llama-imatrix does."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.protocol import Counted, CountTokensJob, Send, TokeniseJob, Tokenized
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.refusal import Refusal

Tokens = npt.NDArray[np.int32]


NO_END = "tokenizer.ggml.add_eos_token"
"""Metadata: whether the vocabulary ends a text with a token. llama.cpp's tools refuse to calibrate and measure if it does."""

_CONTROL = 1 << 3  # llama.h, LLAMA_TOKEN_ATTR_CONTROL
_NULL = -1  # llama.h, LLAMA_TOKEN_NULL


def count_tokens(job: CountTokensJob, send: Send) -> None:
    """Tokenise a text and send the number of tokens."""
    library = load()
    with _open_vocabulary(library, job.model) as vocab:
        send(Counted(len(tokenize(library, vocab, job.text, parse_special=job.parse_special))))


def tokenise(job: TokeniseJob, send: Send) -> None:
    """Tokenise many texts, each by itself and without the tokens that the vocabulary adds at the ends.

    ``job.out`` becomes an ``.npz`` with ``lengths`` int64 [n_texts] (tokens of each text), and the concatenated ``ids``
    int32 [n] and ``sizes`` int32 [n], the bytes of each token's piece.
    """
    library = load()
    llama = library.llama
    texts = msgspec.json.decode(job.texts.read_bytes(), type=list[str])
    with _open_vocabulary(library, job.model) as vocab:
        tokens = [
            tokenize_bytes(library, vocab, text.encode(), add_special=False, parse_special=job.parse_special) for text in texts
        ]
        lengths = np.array([len(each) for each in tokens], np.int64)
        ids = np.concatenate([*tokens, np.empty(0, np.int32)]).astype(np.int32)
        distinct, places = np.unique(ids, return_inverse=True)
        sizes = np.array([len(token_bytes(library, vocab, int(token))) for token in distinct], np.int32)[places]
        with job.out.open("wb") as handle:
            np.savez(handle, ids=ids, sizes=sizes, lengths=lengths)
        n_vocab = llama.llama_vocab_n_tokens(vocab)
        control = [token for token in range(n_vocab) if llama.llama_vocab_get_attr(vocab, token) & _CONTROL]
        special = {token: llama.llama_vocab_get_text(vocab, token).decode("utf-8", "replace") for token in control}
        bos, eos = llama.llama_vocab_bos(vocab), llama.llama_vocab_eos(vocab)
        send(Tokenized(n_vocab, special, max(bos, _NULL), max(eos, _NULL), bool(llama.llama_vocab_get_add_bos(vocab))))


@contextmanager
def _open_vocabulary(library: Library, path: Path) -> Iterator[Any]:
    """The vocabulary of a model, loaded without its weights."""
    params = library.llama.llama_model_default_params()
    params.vocab_only = True
    params.n_gpu_layers = 0
    model = open_model(library, path, params)
    try:
        yield library.llama.llama_model_get_vocab(model)
    finally:
        library.llama.llama_model_free(model)


def token_bytes(library: Library, vocab: Any, token: int, *, special: bool = True) -> bytes:
    """A token's text; control tokens are written out, or empty without ``special``."""
    room = 64
    while True:
        buffer = ctypes.create_string_buffer(room)
        n_bytes = library.llama.llama_token_to_piece(vocab, token, buffer, room, 0, special)
        if n_bytes >= 0:
            return buffer.raw[:n_bytes]
        room = -n_bytes


def open_model(library: Library, path: Path, params: Any) -> Any:
    """Load a model so that its vocabulary adds no end token: chunks of a text have no end, and a prompt is continued.

    Raises :class:`Refusal`; llama.cpp prints the reason on stderr.
    """
    overrides = _no_end(library)
    params.kv_overrides = overrides
    model = library.llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise Refusal.failed(f"llama.cpp cannot load {path.name}", "it did not accept the file, or memory ran out")
    return model


def _no_end(library: Library) -> Any:
    """Metadata overrides for a model's parameters; the last one's key is empty."""
    llama = library.llama
    overrides = (llama.llama_model_kv_override * 2)()
    overrides[0].key, overrides[0].tag = NO_END.encode(), llama.LLAMA_KV_OVERRIDE_TYPE_BOOL
    overrides[0].value.val_bool = False
    return overrides


def tokenize(library: Library, vocab: Any, text: Path, *, parse_special: bool) -> Tokens:
    """int32 [n_tokens]: the whole text, with the special tokens the vocabulary adds.

    llama-imatrix drops one newline at the very end of its ``-f`` file (common/arg.cpp), so this does too.
    """
    data = text.read_bytes()
    data = data[:-1] if data.endswith(b"\n") else data
    return tokenize_bytes(library, vocab, data, add_special=True, parse_special=parse_special)


def tokenize_bytes(library: Library, vocab: Any, data: bytes, *, add_special: bool, parse_special: bool) -> Tokens:
    """int32 [n_tokens]; ``add_special``: with the tokens that the vocabulary adds at the ends."""
    room = len(data) + 16  # a tokenizer gives at most one token per byte, and a few at the ends
    while True:
        tokens: Tokens = np.empty(room, np.int32)
        place = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        found = library.llama.llama_tokenize(vocab, data, len(data), place, room, add_special, parse_special)
        if found >= 0:
            read: Tokens = tokens[:found].copy()
            return read
        if -found <= room:
            raise Refusal.failed("The calibration text could not be tokenised", f"llama_tokenize returned {found}")
        room = -found
