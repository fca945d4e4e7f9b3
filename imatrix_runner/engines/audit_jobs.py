"""The job that compares a quantised file with what llama-quantize makes of its source, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.roundings import STOCK, Rounding

WITHOUT = -1
"""In place of a matrix's number: quantised without imatrix."""

SAMPLE = 1 << 15
"""Elements of each tensor that a sampled audit looks at, at least four rows."""


@dataclass(frozen=True)
class AuditCandidate:
    """A way in which a tensor may have been made: with the matrix of this place in the job (:data:`WITHOUT`: with none), and
    rounded so."""

    matrix: int
    rounding: Rounding = STOCK


@dataclass(frozen=True)
class AuditTensor:
    """A tensor of the file, and the ways in which it may have been made."""

    name: str
    candidates: tuple[AuditCandidate, ...]


@dataclass(frozen=True)
class AuditJob:
    """Compare tensors of ``files`` with what their candidates make of ``sources``; names and shapes are those of the source.

    ``sample``: elements of each tensor to look at, in rows that follow from ``seed`` and the tensor's name; None: all.
    ``covariances``: the folder of those of the model's inputs, for error feedback.
    """

    step: str
    sources: tuple[Path, ...]
    files: tuple[Path, ...]
    tensors: tuple[AuditTensor, ...]
    matrices: tuple[Path, ...]
    seed: int
    sample: int | None
    threads: int | None
    log: Path | None
    covariances: Path | None = None
    native_kernels: bool = True
    native: Native | None = None


@dataclass(frozen=True)
class CandidateFindings:
    """What one candidate makes of a tensor, compared with the file. ``equal_rows`` have the same bytes; of the other rows:
    ``bits`` that differ, the squared errors of the file's numbers (``error``) and of the candidate's (``own_error``), weighted
    by its matrix, and the correlations of both with the source's numbers (0 where there are none)."""

    candidate: AuditCandidate
    equal_rows: int
    bits: int = 0
    error: float = 0.0
    own_error: float = 0.0
    correlation: float = 0.0
    own_correlation: float = 0.0


@dataclass(frozen=True)
class TensorFindings:
    """What was found in ``rows`` of the ``n_rows`` rows of a tensor. ``kept``: its type is the source's own, so that bytes are
    compared with the source (one candidate, without matrix); ``invalid_rows`` hold NaN or infinite numbers or scales; they are
    part of no candidate's figures but its equal rows."""

    name: str
    type: str
    source_type: str
    rows: int
    n_rows: int
    n_elements: int
    kept: bool
    invalid_rows: int
    candidates: tuple[CandidateFindings, ...]
