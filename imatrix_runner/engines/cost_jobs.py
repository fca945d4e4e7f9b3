"""Jobs that measure what rounding a tensor costs: errors of its numbers, and trials in the loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from imatrix_runner.engines.jobs import CollectOptions, Native
from imatrix_runner.engines.roundings import STOCK, Rounding


@dataclass(frozen=True)
class RoundedTensor:
    """A tensor of the source and the ggml type that it is rounded to. ``weighted``: with the imatrix, as far as it has data;
    ``rounding``: how."""

    name: str
    type: str
    weighted: bool = True
    rounding: Rounding = STOCK


@dataclass(frozen=True)
class RoundingErrorsJob:
    """Round each of ``tensors`` and write the errors to ``out`` (:mod:`~imatrix_runner.engines.files.cost_files`).

    Unfinished work with the same ``fingerprint`` in ``out`` is continued at a tensor. ``sources``: the model's files.
    ``include_weights`` and ``exclude_weights`` are llama-quantize's. ``buffer_bytes`` bounds the memory for tensors.
    ``covariances``: the folder of those of the model's inputs, for tensors that are rounded with error feedback. ``ordered``:
    only those groups of tensors (:func:`tensor_groups`) whose places are given to the engine
    (:class:`~imatrix_runner.process.Orders`), as they are given; their errors are handed over, and nothing is written to
    ``out``.
    """

    step: str
    sources: tuple[Path, ...]
    tensors: tuple[RoundedTensor, ...]
    imatrix: Path | None
    out: Path
    fingerprint: str
    threads: int | None
    buffer_bytes: int
    log: Path | None
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    native_kernels: bool = True
    native: Native | None = None
    covariances: Path | None = None
    ordered: bool = False


def tensor_groups(tensors: Sequence[RoundedTensor]) -> tuple[tuple[RoundedTensor, ...], ...]:
    """Consecutive ones of the same name: a tensor is read once for them."""
    return tuple(tuple(group) for _, group in groupby(tensors, lambda each: each.name))


@dataclass(frozen=True)
class RoundingError:
    """Sums over a tensor's elements w, rounded to q: ``weighted`` of imatrix * (w - q)^2 (imatrix: the mean square of the
    column's input, 1 where the imatrix has no data), ``squared`` of (w - q)^2, ``norm`` of imatrix * w^2. Weights that the job
    excludes from rounding count here."""

    tensor: RoundedTensor
    weighted: float
    squared: float
    norm: float


@dataclass(frozen=True)
class Trial:
    """Tensors that are rounded together in the loaded model; all others keep their numbers."""

    name: str
    tensors: tuple[RoundedTensor, ...]


@dataclass(frozen=True)
class TrialsJob:
    """Measure how far the predictions of ``model`` move when the tensors of each trial are rounded, and write the results to
    ``out`` (:mod:`~imatrix_runner.engines.files.cost_files`). Nothing is written to the model.

    ``chunks``: numbers of chunks of ``options.n_ctx`` tokens of ``text``, in the order they are computed, as many at once as
    ``options`` say. In each chunk the tokens from position ``first_scored`` on count. A trial ends after the batch in which the
    standard error of its mean divergence (over chunks, at least four) is below ``enough`` times the mean, and at the last chunk
    at the latest (0: at the last). Unfinished work with the same ``fingerprint`` in ``out`` is continued at a trial: those
    whose names are there are not measured again. ``covariances``: as in :class:`RoundingErrorsJob`. ``ordered``: only
    those trials whose places are given to the engine (:class:`~imatrix_runner.process.Orders`), as they are given; their
    results are handed over, and nothing is written to ``out``.
    """

    step: str
    model: Path
    text: Path
    chunks: tuple[int, ...]
    trials: tuple[Trial, ...]
    imatrix: Path | None
    out: Path
    options: CollectOptions
    fingerprint: str
    log: Path | None
    first_scored: int = 0
    enough: float = 0.0
    include_weights: tuple[str, ...] = ()
    exclude_weights: tuple[str, ...] = ()
    native_kernels: bool = True
    native: Native | None = None
    covariances: Path | None = None
    ordered: bool = False


@dataclass(frozen=True)
class TrialResult:
    """A trial's sums by chunk, in the job's order: ``tokens`` scored, ``kld`` in nats (exactly 0 where no logit moved),
    ``same`` tokens with the source's top token, ``nll`` and ``nll_base`` of -ln p(next token) with and without the rounding."""

    trial: str
    chunks: tuple[int, ...]
    tokens: tuple[int, ...]
    kld: tuple[float, ...]
    same: tuple[int, ...]
    nll: tuple[float, ...]
    nll_base: tuple[float, ...]
