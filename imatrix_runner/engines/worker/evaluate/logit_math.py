"""llama-perplexity's computations on rows of logits: the reference's log-probabilities, and a level's distance from them.

The operations are those of tools/perplexity/perplexity.cpp, float32 where it uses float and float64 where it uses double; only
numpy's exponential may differ from libm's in the last bit.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.logits import LEADING, Rows, factors, row_words
from imatrix_runner.engines.files.token_scores import TOKEN, Tokens

_BLOCK_NUMBERS = 1 << 18

_FLOOR = np.float32(-16.0)
"""Tokens with a lower log-probability in the reference are left out of the divergence."""

F32 = npt.NDArray[np.float32]

I32 = npt.NDArray[np.int32]


def block_rows(n_vocab: int) -> int:
    """Number of rows to process together: enough for numpy to be efficient, few enough to stay in a core's cache."""
    return max(1, _BLOCK_NUMBERS // n_vocab)


def keep_rows(logits: F32, targets: I32) -> tuple[Rows, F32]:
    """Encode the reference: rows as in the file, uint16 [n, row_words], and -ln p(target) float32 [n].

    ``logits`` float32 [n, n_vocab], ``targets`` int32 [n].
    """
    n, n_vocab = logits.shape
    most = logits.max(axis=1)
    least = np.maximum(logits.min(axis=1), most - np.float32(16))
    log_sum = _log_sum(logits, most)
    scale = (most - least) / np.float32(65535)
    rows = np.zeros((n, row_words(n_vocab)), np.uint16)
    leading = rows[:, :LEADING].view(np.float32)
    leading[:, 0], leading[:, 1] = scale, least - most - log_sum
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    steps = logits - least[:, None]
    np.maximum(steps, np.float32(0), out=steps)
    steps *= inverse[:, None]
    np.rint(steps, out=steps)  # to nearest even, as adding 1.5 * 2^23 does in llama.cpp
    rows[:, LEADING : LEADING + n_vocab] = steps
    return rows, most + log_sum - logits[np.arange(n), targets]


def compare_rows(logits: F32, base: Rows, targets: I32) -> Tokens:
    """Compare a level with the reference: :data:`TOKEN` [n]. ``base`` uint16 [n, row_words]."""
    n, n_vocab = logits.shape
    rows = np.arange(n)
    most = logits.max(axis=1)
    whole = most + _log_sum(logits, most)
    scale, least = factors(base)
    steps = base[:, LEADING : LEADING + n_vocab]
    scores = np.zeros(n, TOKEN)
    scores["nll"] = whole - logits[rows, targets]
    scores["base"] = -(scale * steps[rows, targets].astype(np.float32) + least)
    scores["kld"] = _divergences(logits, steps, scale, least, whole)
    scores["dp"] = np.exp(-scores["nll"]) - np.exp(-scores["base"])
    scores["same"] = logits.argmax(axis=1) == steps.argmax(axis=1)
    return scores


def _log_sum(logits: F32, most: F32) -> F32:
    """ln of the sum of exp(logit - most): exponentials in float32, their sum in float64."""
    shifted = logits - most[:, None]
    np.exp(shifted, out=shifted)
    sums: F32 = np.log(shifted.sum(axis=1, dtype=np.float64)).astype(np.float32)
    return sums


def _divergences(logits: F32, steps: Rows, scale: F32, least: F32, whole: F32) -> npt.NDArray[np.float64]:
    """Each row's Σ p(base) * (ln p(base) - ln p) over the tokens to which the reference gives more than e^-16."""
    log_base = steps.astype(np.float32)
    log_base *= scale[:, None]
    log_base += least[:, None]
    terms = log_base - logits
    terms += whole[:, None]
    counted = log_base > _FLOOR
    np.exp(log_base, out=log_base)
    terms *= log_base
    with np.errstate(invalid="ignore"):
        terms *= counted
    sums: npt.NDArray[np.float64] = terms.sum(axis=1, dtype=np.float64)
    if not np.isfinite(sums).all():
        terms[~counted] = 0  # a logit of -inf gives inf * 0 where it is not counted
        sums = terms.sum(axis=1, dtype=np.float64)
    return sums


# Rows processed at once: with a vocabulary of 262144 they take 32 MB.
_ROWS = 32


def score(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32], pool: ThreadPoolExecutor | None = None
) -> tuple[float, float]:
    """Sum of -log p(target) and of its square; ``logits`` float32 [n_tokens, n_vocab], ``targets`` int32 [n_tokens].

    Like ``log_softmax`` of tools/imatrix/imatrix.cpp: exponentials in float32, their sum in float64. ``pool`` computes blocks
    of rows in parallel; their sums are added in order.
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
