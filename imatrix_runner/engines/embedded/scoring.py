"""The perplexity llama-imatrix prints: negative log-likelihoods over the second half of every chunk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

# Rows widened at once: a vocabulary of 262144 makes 32 MB of them.
_ROWS = 32


def score(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32], pool: ThreadPoolExecutor | None = None
) -> tuple[float, float]:
    """Sum of -log p(target) and of its square; ``logits`` float32 [n_tokens, n_vocab], ``targets`` int32 [n_tokens].

    As ``log_softmax`` of tools/imatrix/imatrix.cpp: exponentials in float32, their sum in float64. ``pool`` computes blocks
    of rows side by side; they are added in their order.
    """
    begins = range(0, len(targets), _ROWS)

    def block(begin: int) -> tuple[float, float]:
        return _score_rows(logits[begin : begin + _ROWS], targets[begin : begin + _ROWS])

    nll = squares = 0.0
    for one, square in pool.map(block, begins) if pool is not None else map(block, begins):
        nll, squares = nll + one, squares + square
    return nll, squares


def _score_rows(rows: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]) -> tuple[float, float]:
    chosen = rows[np.arange(len(rows)), targets]
    most = rows.max(axis=1)
    shifted = rows - most[:, None]
    np.exp(shifted, out=shifted)
    values = np.log(shifted.sum(axis=1, dtype=np.float64)) - (chosen - most)
    return float(values.sum()), float((values * values).sum())
