"""A model's vocabulary: tokens of the calibration text, exactly as llama-imatrix sees them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.embedded.library import Library, load
from imatrix_runner.engines.embedded.protocol import Answer, Counted, Tokenize
from imatrix_runner.engines.embedded.refusal import Refusal

Tokens = npt.NDArray[np.int32]


def count(request: Tokenize, tell: Callable[[Answer], None]) -> None:
    """Read the vocabulary only, tokenise, tell how many tokens there are."""
    library = load()
    params = library.llama.llama_model_default_params()
    params.vocab_only = True
    params.n_gpu_layers = 0
    model = open_model(library, request.model, params)
    try:
        tokens = tokenize(
            library, library.llama.llama_model_get_vocab(model), request.text, parse_special=request.parse_special
        )
    finally:
        library.llama.llama_model_free(model)
    tell(Counted(len(tokens)))


def open_model(library: Library, path: Path, params: Any) -> Any:
    """Raises :class:`Refusal`; llama.cpp's own words about the reason are on stderr."""
    model = library.llama.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise Refusal.failed(f"llama.cpp cannot load {path.name}", "it did not accept the file, or memory ran out")
    return model


def tokenize(library: Library, vocab: Any, text: Path, *, parse_special: bool) -> Tokens:
    """int32 [n_tokens]: the whole text, with the special tokens the vocabulary adds.

    llama-imatrix drops one newline at the very end of its ``-f`` file (common/arg.cpp), so this does too.
    """
    data = text.read_bytes()
    data = data[:-1] if data.endswith(b"\n") else data
    room = len(data) + 16  # no tokenizer gives more tokens than bytes, but for what it adds at the ends
    while True:
        tokens: Tokens = np.empty(room, np.int32)
        place = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        found = library.llama.llama_tokenize(vocab, data, len(data), place, room, True, parse_special)
        if found >= 0:
            read: Tokens = tokens[:found].copy()
            return read
        if -found <= room:
            raise Refusal.failed("The calibration text could not be tokenised", f"llama_tokenize answered {found}")
        room = -found
