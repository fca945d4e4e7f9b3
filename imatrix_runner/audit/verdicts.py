"""Verdicts on tensors and on files, from what an audit found. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from imatrix_runner.engines.audit_jobs import WITHOUT, CandidateFindings, TensorFindings
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.models.ggml_types import IGNORE_WEIGHTS

TensorVerdict = Literal[
    "identical", "identical without imatrix", "another matrix", "another quantiser", "damaged", "another source"
]
"""In the order of how much they say against a file."""

ORDER: tuple[TensorVerdict, ...] = (
    *("identical", "identical without imatrix", "another matrix", "another quantiser"),
    *("damaged", "another source"),
)

FARTHEST = 4.0
"""Largest squared error, relative to llama-quantize's in the same rows, that a quantiser is believed to leave. Error feedback
and searches for other aims stay below 2, other versions of ggml at 1; the numbers of another model are far above."""

_LEAST_CORRELATION = 0.5
"""Smallest correlation with the source, relative to that of llama-quantize's numbers, of a tensor made from this source."""

_FEW = 0.5
"""Up to this share of differing rows, errors beyond :data:`FARTHEST` are damage: the other rows are of the source."""


@dataclass(frozen=True)
class AuditedTensor:
    """A tensor's verdict. ``matrix``: the place of the matrix that it was made with, where that is known (WITHOUT: with
    none); ``rounding``: how it was rounded, where its bytes were found; ``error_ratio``: of the rows that differ, the file's
    weighted squared error relative to llama-quantize's (None where nothing differs or nothing can be said)."""

    findings: TensorFindings
    verdict: TensorVerdict
    why: str = ""
    matrix: int | None = None
    rounding: Rounding = STOCK
    error_ratio: float | None = None

    @property
    def name(self) -> str:
        return self.findings.name


def choose_matrix(found: Sequence[TensorFindings], preferred: Sequence[int]) -> int:
    """The matrix (or WITHOUT) that explains most tensors: the first of ``preferred`` among those that are equal in that."""
    explained: Counter[int] = Counter()
    rows: Counter[int] = Counter()
    for tensor in found:
        if not tensor.kept:
            explained.update({each.candidate.matrix for each in tensor.candidates if each.equal_rows == tensor.rows})
            for matrix in {each.candidate.matrix for each in tensor.candidates}:
                rows[matrix] += max(each.equal_rows for each in tensor.candidates if each.candidate.matrix == matrix)
    return max(preferred, key=lambda matrix: (explained[matrix], rows[matrix], -preferred.index(matrix)))


def tensor_verdict(found: TensorFindings, matrix: int, declared: Rounding = STOCK) -> AuditedTensor:
    """The verdict on one tensor of a file that is supposed to be made with ``matrix``. ``declared``: the rounding that its
    metadata names."""
    if found.invalid_rows:
        why = f"NaN or infinite numbers or scales in {found.invalid_rows} of {found.rows} rows"
        return AuditedTensor(found, "damaged", why)
    if found.kept:
        return _kept(found)
    same = [each for each in found.candidates if each.equal_rows == found.rows]
    if same:
        return _same(found, same, matrix)
    if not found.candidates:
        return AuditedTensor(found, "another quantiser", f"llama-quantize makes no {found.type} of {found.source_type} here")
    return _different(found, declared)


def _kept(found: TensorFindings) -> AuditedTensor:
    copied = found.candidates[0]
    differing = found.rows - copied.equal_rows
    if not differing:
        return AuditedTensor(found, "identical", matrix=None)
    if copied.bits == 1:
        return AuditedTensor(found, "damaged", "one bit differs from the source's")
    why = f"it is not quantised, and {differing} of {found.rows} rows differ from the source's"
    return AuditedTensor(found, "another source", why)


def _same(found: TensorFindings, same: Sequence[CandidateFindings], matrix: int) -> AuditedTensor:
    by_matrix = {each.candidate.matrix: each.candidate for each in reversed(same)}
    if found.type.upper() in IGNORE_WEIGHTS:
        return AuditedTensor(found, "identical", matrix=None, rounding=same[0].candidate.rounding)
    if matrix in by_matrix and matrix != WITHOUT:
        return AuditedTensor(found, "identical", matrix=matrix, rounding=by_matrix[matrix].rounding)
    if WITHOUT in by_matrix:
        return AuditedTensor(found, "identical without imatrix", matrix=WITHOUT, rounding=by_matrix[WITHOUT].rounding)
    other = same[0].candidate
    return AuditedTensor(found, "another matrix", matrix=other.matrix, rounding=other.rounding)


def _different(found: TensorFindings, declared: Rounding) -> AuditedTensor:
    nearest = max(found.candidates, key=lambda each: (each.equal_rows, -each.bits))
    differing = found.rows - nearest.equal_rows
    rows = f"{differing} of {found.rows} rows differ"
    ratio = _ratio(nearest.error, nearest.own_error)
    if nearest.bits == 1:
        return AuditedTensor(found, "damaged", "one bit differs", nearest.candidate.matrix, error_ratio=ratio)
    unlike = nearest.correlation < _LEAST_CORRELATION * nearest.own_correlation
    if unlike or ratio > FARTHEST:
        said = "do not correlate with the source" if unlike else f"have {_times(ratio)} the error that quantising leaves"
        if differing <= _FEW * found.rows:
            return AuditedTensor(found, "damaged", f"{differing} of {found.rows} rows {said}", error_ratio=ratio)
        return AuditedTensor(found, "another source", f"its numbers {said}", error_ratio=ratio)
    why = f"{rows}, with {ratio:.3g} times llama-quantize's weighted error" + (
        f"; its metadata declares the rounding: {declared}" if declared != STOCK else ""
    )
    return AuditedTensor(found, "another quantiser", why, error_ratio=ratio)


def _ratio(error: float, own: float) -> float:
    if own > 0:
        return min(error / own, 1e9)
    return 1.0 if error <= 0 else 1e9


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio < 1e6 else "far more than"


def counted_verdicts(tensors: Sequence[AuditedTensor]) -> Mapping[TensorVerdict, int]:
    """How many tensors have each verdict, in order, without those that none has."""
    counts = Counter(tensor.verdict for tensor in tensors)
    return {verdict: counts[verdict] for verdict in ORDER if counts[verdict]}
