"""Whether a matrix has seen enough text. Pure: numbers in, numbers out.

A quantiser weighs the columns of a row against each other and does not care about a tensor's overall scale. So an entry is
reduced to ``p``: each row's mean squares, scaled to add up to 1 (an expert without a token is quantised with equal weights for
all columns, so its ``p`` is even). The distance of two such matrices is the total variation ½ Σ |p − q|, the share of the
importance that is in other columns; 0 for equal ones, 1 at most.

Were the chunks independent samples, with σ² the variance that one chunk gives to an element of p, the means after k − w and
after k chunks would differ with variance σ² (1/(k − w) − 1/k) = σ²/k · w/(k − w). So the move over the newest w chunks, times
√((k − w)/w), estimates the standard error σ/√k of the matrix as it is now: how far it still is, as a share of the importance,
from what endless text of the same kind would give. (Twice the text would move it by 1/√2 of that.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from imatrix_runner.imatrix.matrix import Counts, Matrix, MatrixEntry, Sums

_POINTS_TO_STOP = 2
"""A single point below the tolerance may be chance."""


@dataclass(frozen=True)
class Point:
    """The convergence after ``chunks``: the estimated errors of the worst tensor (``tensor``) and of the median one."""

    chunks: int
    worst: float
    tensor: str
    median: float


def shares(sums: Sums) -> Sums:
    """Rows scaled to add up to 1; a row of zeros becomes even. float64 [n_mat, n_columns]."""
    totals = sums.sum(axis=1, keepdims=True)
    even = np.full_like(sums, 1 / sums.shape[1])
    np.divide(sums, totals, out=even, where=totals > 0)
    return even


def distance(before: MatrixEntry, after: MatrixEntry) -> float:
    """Total variation between the shares of two states of an entry; experts count as much as their tokens in ``after``."""
    weights = after.counts.astype(np.float64)
    if not weights.sum():
        return 0.0
    moved = 0.5 * np.abs(shares(after.sums) - shares(before.sums)).sum(axis=1)
    return float((moved * weights).sum() / weights.sum())


def estimate(before: MatrixEntry, after: MatrixEntry, chunks: int, newest: int) -> float:
    """Return the estimated error of an entry after ``chunks``, of which the ``newest`` turned ``before`` into ``after``."""
    return distance(before, after) * math.sqrt((chunks - newest) / newest)


def point(chunks: int, errors: Iterable[tuple[str, float]]) -> Point | None:
    """Return the point of the curve from the errors of tensors; None if there are none."""
    ordered = sorted(errors, key=lambda named: named[1])
    if not ordered:
        return None
    tensor, worst = ordered[-1]
    return Point(chunks, worst, tensor.removesuffix(".weight"), float(np.median([error for _, error in ordered])))


def converged(curve: Sequence[Point], tolerance: float) -> int | None:
    """Return after how many chunks two points in a row were at most ``tolerance`` in every tensor; None if they never were.

    Two points need at least three ranges.
    """
    run = 0
    for item in curve:
        run = run + 1 if item.worst <= tolerance else 0
        if run == _POINTS_TO_STOP:
            return item.chunks
    return None


@dataclass(frozen=True)
class Uncovered:
    """The experts of one tensor that saw too few tokens, and how many they saw."""

    tensor: str
    experts: tuple[int, ...]
    tokens: tuple[int, ...]
    n_experts: int

    def describe(self) -> str:
        """``blk.3.ffn_down_exps: experts 5, 17 of 64 saw 0 and 3 tokens``."""
        many = len(self.experts) > 1
        names, tokens = _some(self.experts, ", "), _some(self.tokens, " and " if len(self.experts) == 2 else ", ")
        return f"{self.tensor}: expert{'s' if many else ''} {names} of {self.n_experts} saw {tokens} tokens"


_NAMED = 6


def _some(numbers: Sequence[int], between: str) -> str:
    return between.join(map(str, numbers[:_NAMED])) + (", …" if len(numbers) > _NAMED else "")


def uncovered(matrix: Matrix, least: int) -> list[Uncovered]:
    """The tensors with experts that saw fewer than ``least`` tokens; reads counts only."""
    found: list[Uncovered] = []
    for name in matrix.entries:
        counts = matrix.counts(name)
        if counts.size > 1 and (counts < least).any():
            found.append(_uncovered(name, counts, least))
    return found


def _uncovered(name: str, counts: Counts, least: int) -> Uncovered:
    experts = np.flatnonzero(counts < least)
    return Uncovered(name.removesuffix(".weight"), tuple(experts.tolist()), tuple(counts[experts].tolist()), counts.size)
