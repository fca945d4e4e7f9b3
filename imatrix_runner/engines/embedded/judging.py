"""What llama-perplexity computes of a row of logits: the reference's log-probabilities, and a level's distance from them.

The operations are those of tools/perplexity/perplexity.cpp, float32 where it has float and float64 where it has double; only
numpy's exponential may differ from libm's in the last bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.logits_file import Rows, row_words

_LEADING = 4
_BLOCK_NUMBERS = 1 << 18
_FLOOR = np.float32(-16.0)
"""Log-probabilities below this are as good as none: neither kept nor compared."""

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

TOKEN = np.dtype([("nll", "<f4"), ("base", "<f4"), ("kld", "<f8"), ("dp", "<f4"), ("same", "<u4")])
"""One scored token: -ln p(token) of the level and of the reference, the Kullback-Leibler divergence of the level from the
reference, p - p(reference), and whether both put the same token first."""

Tokens = npt.NDArray[np.void]


def block_rows(n_vocab: int) -> int:
    """Rows to look at together: so many that numpy has enough to do, so few that they stay in a core's cache."""
    return max(1, _BLOCK_NUMBERS // n_vocab)


def keep_rows(logits: F32, targets: I32) -> tuple[Rows, F32]:
    """The reference: rows as the file holds them, uint16 [n, row_words], and -ln p(target) float32 [n].

    ``logits`` float32 [n, n_vocab], ``targets`` int32 [n].
    """
    n, n_vocab = logits.shape
    most = logits.max(axis=1)
    least = np.maximum(logits.min(axis=1), most - np.float32(16))
    log_sum = _log_sum(logits, most)
    scale = (most - least) / np.float32(65535)
    rows = np.zeros((n, row_words(n_vocab)), np.uint16)
    leading = rows[:, :_LEADING].view(np.float32)
    leading[:, 0], leading[:, 1] = scale, least - most - log_sum
    with np.errstate(divide="ignore"):
        inverse = np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    steps = logits - least[:, None]
    np.maximum(steps, np.float32(0), out=steps)
    steps *= inverse[:, None]
    np.rint(steps, out=steps)  # to even, as the addition of 1.5 * 2^23 rounds
    rows[:, _LEADING : _LEADING + n_vocab] = steps
    return rows, most + log_sum - logits[np.arange(n), targets]


def compare_rows(logits: F32, base: Rows, targets: I32) -> Tokens:
    """A level against the reference: :data:`TOKEN` [n]. ``base`` uint16 [n, row_words]."""
    n, n_vocab = logits.shape
    rows = np.arange(n)
    most = logits.max(axis=1)
    whole = most + _log_sum(logits, most)
    leading = np.ascontiguousarray(base[:, :_LEADING]).view(np.float32)
    scale, least = leading[:, 0], leading[:, 1]
    steps = base[:, _LEADING : _LEADING + n_vocab]
    judged = np.zeros(n, TOKEN)
    judged["nll"] = whole - logits[rows, targets]
    judged["base"] = -(scale * steps[rows, targets].astype(np.float32) + least)
    judged["kld"] = _divergences(logits, steps, scale, least, whole)
    judged["dp"] = np.exp(-judged["nll"]) - np.exp(-judged["base"])
    judged["same"] = logits.argmax(axis=1) == steps.argmax(axis=1)
    return judged


def _log_sum(logits: F32, most: F32) -> F32:
    """ln of the sum of exp(logit - most): exponentials in float32, their sum in float64."""
    shifted = logits - most[:, None]
    np.exp(shifted, out=shifted)
    sums: F32 = np.log(shifted.sum(axis=1, dtype=np.float64)).astype(np.float32)
    return sums


def _divergences(logits: F32, steps: Rows, scale: F32, least: F32, whole: F32) -> npt.NDArray[np.float64]:
    """Of each row Σ p(base) * (ln p(base) - ln p) over the tokens to which the reference gives more than e^-16."""
    log_base = steps.astype(np.float32)
    log_base *= scale[:, None]
    log_base += least[:, None]
    terms = log_base - logits
    terms += whole[:, None]
    heard = log_base > _FLOOR
    np.exp(log_base, out=log_base)
    terms *= log_base
    with np.errstate(invalid="ignore"):
        terms *= heard
    sums: npt.NDArray[np.float64] = terms.sum(axis=1, dtype=np.float64)
    if not np.isfinite(sums).all():
        terms[~heard] = 0  # a logit of -inf is inf * 0 where it is not heard
        sums = terms.sum(axis=1, dtype=np.float64)
    return sums
