"""Whether a reference is a language model's: what it predicts must depend on the text, and be better than a uniform guess.

Everything that is measured against a reference means nothing where these do not hold. They are read from the file of
log-probabilities, so one check serves both engines and files that llama-perplexity wrote elsewhere.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.logits_file import LEADING, LogitsHead, Rows, read_tokens

_CHUNKS, _ROWS = 8, 8
"""Chunks that are looked at, and predictions of each that are read whole: a reference is wrong everywhere or nowhere."""

_UNIFORM_SHARE = 0.9
"""Share of a vocabulary's size above which a perplexity is called that of a uniform guess, which has all of it. Trained models
stay far below it, also on a text in a language that they hardly know."""

_SUM_ERROR = 0.02
"""How far a row's probabilities may be from 1 together: 16 bits between two log-probabilities make up less than 0.001."""

F64 = npt.NDArray[np.float64]


def no_language_model(path: Path, head: LogitsHead, n_chunks: int | None = None) -> str:
    """Why the log-probabilities in ``path`` are not a causal language model's, as a phrase about the model; empty if they may
    be. ``n_chunks``: how many chunks of the file are written (None: all)."""
    tokens = read_tokens(path, head)
    first = head.n_ctx // 2
    chosen = np.linspace(0, head.rows - 1, min(_ROWS, head.rows)).astype(int)
    rows: list[Rows] = []
    nll: list[F64] = []
    count = min(head.n_chunks if n_chunks is None else n_chunks, _CHUNKS)
    for chunk in range(count):
        whole = np.memmap(
            path, "<u2", "r", head.rows_at + chunk * head.chunk_bytes, (head.rows, head.chunk_bytes // 2 // head.rows)
        )
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
    """What, why and what to do, for a model of which :func:`no_language_model` says ``why``."""
    return (
        f"{model} cannot be measured against",
        f"{why}: figures against it would mean nothing",
        "Take a causal language model that answers sensibly (try it with llama-cli), or give another --text.",
    )


def uniform_guess(nll: float, n_vocab: int) -> str:
    """The phrase for a mean -ln p that a uniform guess over the vocabulary has, too; empty for a lower one."""
    if nll < math.log(_UNIFORM_SHARE * n_vocab):
        return ""
    return f"its perplexity is {math.exp(min(nll, 700.0)):.4g}, and a uniform guess among its {n_vocab} tokens has {n_vocab}"


def _constant(rows: npt.NDArray[np.uint16], inputs: npt.NDArray[np.int32]) -> str:
    """``rows`` [chunks, rows, words], ``inputs`` [chunks, rows]: the token after which each row was predicted."""
    if (rows == rows[0, 0]).all():
        # A text of one token alone tells nothing.
        return "its predictions are the same after every text" if (inputs != inputs[0, 0]).any() else ""
    other = (inputs != inputs[0]).any(axis=1)
    if other.any() and (rows[other] == rows[0]).all():
        return "its predictions depend on the position alone, not on the text"
    return ""


def _not_probabilities(rows: Rows, head: LogitsHead) -> str:
    scale, least = _leading(rows)
    totals = np.exp(rows[:, LEADING : LEADING + head.n_vocab] * scale[:, None] + least[:, None]).sum(axis=1)
    most = 1 + head.n_vocab * math.exp(-16) + _SUM_ERROR  # a token below e^-16 of the likeliest is kept as this likely
    wrong = totals[(totals < 1 - _SUM_ERROR) | (totals > most)]
    return f"the probabilities of its next tokens add up to {wrong[0]:.3g}, not to 1" if len(wrong) else ""


def _leading(rows: Rows) -> tuple[F64, F64]:
    """Each row's scale and least log-probability."""
    scale, least = np.ascontiguousarray(rows[:, :LEADING]).view("<f4").astype(np.float64).T
    return scale, least
