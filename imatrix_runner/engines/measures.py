"""How a level is measured against its source: the jobs an engine is given, and the figures that come of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.base import ChunkRange, CollectOptions

KLD_FRACTIONS = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0.0)
DP_FRACTIONS = (1.0, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0)


@dataclass(frozen=True)
class ReferJob:
    """Write what ``model`` predicts over chunks ``chunks`` of ``text`` into ``out``, llama-perplexity's format
    (:mod:`~imatrix_runner.engines.logits_file`). Unfinished work of the same ``fingerprint`` in ``out`` is continued.

    ``scored`` (:mod:`~imatrix_runner.engines.embedded.scored`, with its own fingerprint) gets the model's exact -ln p of every
    scored token, after those of the chunks before: ``out`` holds none below e^-16 of the likeliest one. Engines that cannot
    leave it out.
    """

    step: str
    model: Path
    text: Path
    chunks: ChunkRange
    out: Path
    options: CollectOptions
    fingerprint: str
    log: Path | None
    scored: tuple[Path, str] | None = None


@dataclass(frozen=True)
class JudgeJob:
    """Compare what ``model`` predicts with the reference in ``base``, token by token, into ``out``
    (:mod:`~imatrix_runner.engines.embedded.scored`). Unfinished work of the same ``fingerprint`` is continued.

    ``base`` holds the text's chunks from number ``first`` on (``out`` then holds those before); ``limit`` of them are compared.
    """

    step: str
    model: Path
    base: Path
    out: Path
    options: CollectOptions
    fingerprint: str
    log: Path | None
    first: int = 0
    limit: int | None = None


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """How far a level is from its source on a text. ``kld`` in nats; ``dp`` (p - p of the source) and ``same_top`` as shares.

    ``kld_at`` and ``dp_at``: fraction of the tokens -> the value that so many do not exceed (0.5 is the median).
    """

    n_tokens: int
    ppl: Estimate
    ppl_base: Estimate
    correlation: float
    log_ratio: Estimate
    ratio: Estimate
    difference: Estimate
    kld: Estimate
    kld_at: Mapping[float, float]
    dp: Estimate
    dp_at: Mapping[float, float]
    dp_rms: Estimate
    same_top: Estimate


@dataclass(frozen=True)
class Prompt:
    """A text for a model to go on from. ``parse_special``: control tokens are written out in it and mean themselves."""

    text: str
    parse_special: bool


@dataclass(frozen=True)
class AnswerJob:
    """Let ``model`` answer the prompts in ``prompts`` (a :class:`Prompt` on each line, as JSON) greedily, in ``n_predict``
    tokens at most, into ``out`` (:mod:`~imatrix_runner.engines.embedded.completions`). Unfinished work of the same
    ``fingerprint`` is continued; of ``options`` what concerns chunks means nothing."""

    step: str
    model: Path
    prompts: Path
    out: Path
    n_predict: int
    options: CollectOptions
    fingerprint: str
    log: Path | None


@dataclass(frozen=True)
class Completion:
    """The answer to prompt number ``prompt`` (from 0), which has ``n_prompt`` tokens. ``ended``: by itself, with a token that
    ends a generation and is not among ``ids``."""

    prompt: int
    n_prompt: int
    ids: tuple[int, ...]
    ended: bool
    text: str
