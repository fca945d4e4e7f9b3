"""Jobs that measure a level against its source or let it answer prompts, and their results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.errors import RunnerError

KLD_FRACTIONS = (1.0, 0.999, 0.99, 0.95, 0.9, 0.5, 0.1, 0.05, 0.01, 0.001, 0.0)
DP_FRACTIONS = (1.0, 0.999, 0.99, 0.95, 0.9, 0.75, 0.5, 0.25, 0.1, 0.05, 0.01, 0.001, 0.0)


@dataclass(frozen=True)
class ReferenceJob:
    """Write the log-probabilities of ``model`` on ``chunks`` of ``text`` to ``out``, in llama-perplexity's format
    (:mod:`~imatrix_runner.engines.files.logits`). Unfinished work with the same ``fingerprint`` in ``out`` is continued.

    ``scored`` (:mod:`~imatrix_runner.engines.files.token_scores`, with its own fingerprint) gets the model's exact -ln p of
    every scored token, after those of earlier chunks: ``out`` holds no probability below e^-16 of the likeliest token's.
    Engines that cannot write it ignore it. ``alone``: it gets those of ``chunks`` only. ``order``: the numbers in the text of
    ``chunks``, where these count in another order than the text's (empty: they do not)."""

    step: str
    model: Path
    text: Path
    chunks: ChunkRange
    out: Path
    options: CollectOptions
    fingerprint: str
    log: Path | None
    scored: tuple[Path, str] | None = None
    alone: bool = False
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class MeasureJob:
    """Compare the predictions of ``model`` with the reference in ``base``, token by token, and write the scores to ``out``
    (:mod:`~imatrix_runner.engines.files.token_scores`). Unfinished work with the same ``fingerprint`` is continued.

    ``base`` holds the text's chunks from number ``first`` on (``out`` holds the scores of those before, unless the job stands
    ``alone``); the first ``limit`` chunks of ``base`` are compared (None: all).
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
    alone: bool = False


@dataclass(frozen=True)
class RangeSubject:
    """A file to compare with the source in ranges of chunks. ``step`` is its step in progress."""

    step: str
    name: str
    file: Path
    log: Path | None


@dataclass(frozen=True)
class MeasuredRange:
    """Chunks of the text, whole batches, and the places in :attr:`RangesJob.subjects` of those to compare on them. ``order``:
    as in :class:`ReferenceJob`."""

    chunks: ChunkRange
    subjects: tuple[int, ...]
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class RangesJob:
    """Compare ``subjects`` with their source ``model`` on each of ``ranges`` of ``text``. No range depends on another, so they
    may be computed in any order, and on several machines."""

    step: str
    model: Path
    text: Path
    subjects: tuple[RangeSubject, ...]
    ranges: tuple[MeasuredRange, ...]
    options: CollectOptions
    log: Path | None

    @property
    def n_chunks(self) -> int:
        """Chunks to compute: those of the source, and those of every subject."""
        return sum(each.chunks.count * (1 + len(each.subjects)) for each in self.ranges)


@dataclass(frozen=True)
class RangeScores:
    """What one range gave for a subject (its place in :attr:`RangesJob.subjects`; None: the source's own scores).

    ``scores``: :data:`~imatrix_runner.engines.files.token_scores.TOKEN` [count, rows] as bytes, or why there are none.
    ``seconds``: time it took.
    """

    chunks: ChunkRange
    subject: int | None
    scores: bytes | RunnerError
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Divergence:
    """How far a level is from its source on a text. ``kld`` in nats; ``dp`` (p - p of the source), ``same_top`` as fractions.

    ``kld_at`` and ``dp_at``: quantiles, fraction of the tokens -> value that they do not exceed (0.5 is the median).
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
    """A text for a model to continue. ``parse_special``: control tokens written out in it are read as control tokens."""

    text: str
    parse_special: bool


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: at a ``temperature``, from the likeliest that have ``top_p`` of the probability together. Each
    prompt draws its own random numbers from ``seed`` and its place, so that no answer depends on the others."""

    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True)
class AnswerJob:
    """Let ``model`` answer the prompts in ``prompts`` (a :class:`Prompt` on each line, as JSON), in ``n_predict`` tokens at
    most, greedily or as ``sampling`` says, and write the answers to ``out`` (:mod:`~imatrix_runner.engines.files.completions`).
    Unfinished work with the same ``fingerprint`` is continued. The ``options`` about chunks have no effect."""

    step: str
    model: Path
    prompts: Path
    out: Path
    n_predict: int
    options: CollectOptions
    fingerprint: str
    log: Path | None
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Completion:
    """The answer to prompt number ``prompt`` (from 0), which has ``n_prompt`` tokens. ``ended``: the model ended it with an
    end-of-generation token, which is not among ``ids``, and whose text is ``end``."""

    prompt: int
    n_prompt: int
    ids: tuple[int, ...]
    ended: bool
    text: str
    end: str = ""
