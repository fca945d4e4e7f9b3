"""Checks that a reference comes from a language model: its predictions must depend on the text and beat a uniform guess.

Figures measured against any other reference mean nothing. The checks read the file of log-probabilities, so they serve both
engines and files that llama-perplexity wrote elsewhere.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.logits import LEADING, LogitsHead, Rows, factors, map_rows, read_tokens

_CHUNKS, _ROWS = 8, 8
"""Numbers of chunks to check, and of predictions in each to read completely: a reference is wrong everywhere or nowhere."""

_UNIFORM_SHARE = 0.9
"""A perplexity above this share of the vocabulary's size counts as that of a uniform guess, whose perplexity is the whole size.
Trained models stay far below it, even on a text in a language that they hardly know."""

_SUM_ERROR = 0.02
"""How far the sum of a row's probabilities may be from 1; rounding to 16 bits accounts for less than 0.001."""

F64 = npt.NDArray[np.float64]


def no_language_model(path: Path, head: LogitsHead, n_chunks: int | None = None) -> str:
    """Why the log-probabilities in ``path`` cannot be a causal language model's, as a phrase about the model; empty if they
    can. ``n_chunks``: how many chunks of the file are written (None: all)."""
    tokens = read_tokens(path, head)
    first = head.n_ctx // 2
    chosen = np.linspace(0, head.rows - 1, min(_ROWS, head.rows)).astype(int)
    rows: list[Rows] = []
    nll: list[F64] = []
    count = min(head.n_chunks if n_chunks is None else n_chunks, _CHUNKS)
    for chunk in range(count):
        whole = map_rows(path, head, chunk)
        rows.append(np.array(whole[chosen]))
        if why := _not_probabilities(rows[-1], head):
            return why
        scale, least = _leading(whole)
        targets = tokens[chunk, first + 1 : first + 1 + head.rows]
        nll.append(-(scale * whole[np.arange(head.rows), LEADING + targets] + least))
    if not rows:
        return ""
    return _constant(np.stack(rows), tokens[:count, first + chosen]) or uniform_guess(
        float(np.concatenate(nll).mean()), head.n_vocab
    )


def no_reference(model: str, why: str) -> tuple[str, str, str]:
    """The three lines of the error for a model that :func:`no_language_model` rejects because of ``why``."""
    return (
        f"{model} cannot be measured against",
        f"{why}: figures against it would mean nothing",
        "Use a causal language model that answers sensibly (try it with llama-cli), or give another --text.",
    )


def uniform_guess(nll: float, n_vocab: int) -> str:
    """The phrase for a mean -ln p that is no better than a uniform guess over the vocabulary; empty for a lower one."""
    if nll < math.log(_UNIFORM_SHARE * n_vocab):
        return ""
    return f"its perplexity is {math.exp(min(nll, 700.0)):.4g}, and a uniform guess among its {n_vocab} tokens has {n_vocab}"


def _constant(rows: npt.NDArray[np.uint16], inputs: npt.NDArray[np.int32]) -> str:
    """The phrase for predictions that do not depend on the text, or empty. ``rows`` [chunks, rows, words], ``inputs``
    [chunks, rows]: the token after which each row was predicted."""
    if (rows == rows[0, 0]).all():
        # A text that repeats one token shows nothing.
        return "its predictions are the same after every text" if (inputs != inputs[0, 0]).any() else ""
    other = (inputs != inputs[0]).any(axis=1)
    if other.any() and (rows[other] == rows[0]).all():
        return "its predictions depend on the position alone, not on the text"
    return ""


def _not_probabilities(rows: Rows, head: LogitsHead) -> str:
    scale, least = _leading(rows)
    totals = np.exp(rows[:, LEADING : LEADING + head.n_vocab] * scale[:, None] + least[:, None]).sum(axis=1)
    most = 1 + head.n_vocab * math.exp(-16) + _SUM_ERROR  # probabilities are raised to e^-16 of the likeliest token's
    wrong = totals[(totals < 1 - _SUM_ERROR) | (totals > most)]
    return f"the probabilities of its next tokens add up to {wrong[0]:.3g}, not to 1" if len(wrong) else ""


def _leading(rows: Rows) -> tuple[F64, F64]:
    """Each row's scale and min_log_prob, float64 [n]."""
    scale, least = factors(rows)
    return scale.astype(np.float64), least.astype(np.float64)
