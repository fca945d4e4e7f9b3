"""The perplexity llama-imatrix prints: negative log-likelihoods over the second half of every chunk."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Rows widened at once: a vocabulary of 262144 makes 32 MB of them.
_ROWS = 32


def score(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> tuple[float, float]:
    """Sum of -log p(target) and of its square; ``logits`` float32 [n_tokens, n_vocab], ``targets`` int32 [n_tokens].

    As ``log_softmax`` of tools/imatrix/imatrix.cpp: exponentials in float32, their sum in float64.
    """
    nll = squares = 0.0
    for begin in range(0, len(targets), _ROWS):
        rows = logits[begin : begin + _ROWS]
        chosen = rows[np.arange(len(rows)), targets[begin : begin + _ROWS]]
        most = rows.max(axis=1)
        shifted = rows - most[:, None]
        np.exp(shifted, out=shifted)
        values = np.log(shifted.sum(axis=1, dtype=np.float64)) - (chosen - most)
        nll += float(values.sum())
        squares += float((values * values).sum())
    return nll, squares
