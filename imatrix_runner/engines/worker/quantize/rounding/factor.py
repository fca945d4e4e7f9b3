"""Factors of covariances for error feedback: H + damping = U D U^T, U unit upper triangular, D diagonal.

The factor says how a rounded column's error is to be made up for by the columns that are still to be rounded, and D what an
error that is left costs; see docs/kernels.md, "Error feedback".
"""

from __future__ import annotations

import ctypes
import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

PANEL = 32
"""Columns of a panel of U (native/panels.h); a covariance's size must be a multiple of it, as that of every block is."""

_TILE, _ROWS = 64, 128  # native/factor.c: columns that are computed together, and rows of one call
_TOLERANCE = 1e-4
"""A conditional variance may come out below zero by this part of the column's own: rounding of a covariance in float32."""


class FactorError(Exception):
    """A matrix is no covariance: not finite, not positive semidefinite, or zero. ``column``: where that was seen, or None."""

    def __init__(self, why: str, column: int | None = None) -> None:
        super().__init__(why)
        self.column = column


@dataclass(frozen=True, eq=False)
class Factor:
    """U and D of one covariance of ``n`` inputs.

    ``conditional``: D, float32 [n]: the variance of each input that remains when the inputs after it are known, plus damping.
    ``weights``: D divided by a power of two so that the greatest is between 1/2 and 1, for searches.
    ``panels``: U, float32 [n * (n + 32) / 2], as native/panels.h describes it. ``damping``: what was added to the diagonal.
    """

    n: int
    conditional: Floats
    weights: Floats
    panels: Floats
    damping: float

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes + self.conditional.nbytes + self.weights.nbytes


def factor_bytes(n: int) -> int:
    """Memory of the factor of a covariance of ``n`` inputs."""
    return 4 * (n * (n + PANEL) // 2 + 2 * n)


def factorise(library: ctypes.CDLL, covariance: Floats, damping: float, pool: ThreadPoolExecutor | None = None) -> Factor:
    """The factor of a covariance, float32 [n, n] in C order, of which only the upper triangle is read.

    ``library``: the compiled native kernels. ``damping``: the part of the mean of the diagonal that is added to the diagonal,
    1e-4 or more. ``pool``: threads to share the work, of which the caller must not be one; the factor is the same with any
    number. Raises :class:`FactorError`.
    """
    n = len(covariance)
    if covariance.shape != (n, n) or not n or n % PANEL:
        raise FactorError(f"a covariance is a square matrix whose size is a multiple of {PANEL}, not {covariance.shape}")
    if covariance.dtype != np.float32 or not covariance.flags.c_contiguous:
        raise FactorError(f"a covariance is float32 in C order, not {covariance.dtype} with strides {covariance.strides}")
    diagonal = np.diagonal(covariance)
    for column in np.flatnonzero(~(np.isfinite(diagonal) & (diagonal >= 0)))[:1]:
        raise FactorError(f"input {column} has the variance {diagonal[column]}", int(column))
    added = damping * math.fsum(diagonal.tolist()) / n  # fsum: the same on every machine
    if not 0 < added < math.inf:
        raise FactorError("all inputs were zero")
    conditional, panels = np.empty(n, np.float32), np.empty(n * (n + PANEL) // 2, np.float32)
    _Factorising(library, covariance, conditional, panels, added).run(pool)
    weights = np.ldexp(conditional, -math.frexp(float(conditional.max()))[1])
    return Factor(n, conditional, weights, panels, added)


class _Factorising:
    """The computation of one factor, tile by tile from the last column to the first."""

    def __init__(self, library: ctypes.CDLL, covariance: Floats, conditional: Floats, panels: Floats, damping: float) -> None:
        pointer, size, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        self._n, self._damping = len(covariance), damping
        self._diagonal: Any = library.imatrix_runner_factor_diagonal
        self._diagonal.argtypes, self._diagonal.restype = (pointer, size, pointer, pointer, size, real, real), size
        self._rows: Any = library.imatrix_runner_factor_rows
        self._rows.argtypes, self._rows.restype = (pointer, size, pointer, pointer, size, size, size), None
        self._arguments = (covariance.ctypes.data, self._n, panels.ctypes.data, conditional.ctypes.data)

    def run(self, pool: ThreadPoolExecutor | None) -> None:
        for tile in range((self._n - 1) // _TILE * _TILE, -1, -_TILE):
            wrong = self._diagonal(*self._arguments, tile, self._damping, _TOLERANCE)
            if wrong >= 0:
                raise FactorError(f"the covariance is not positive semidefinite, or not finite, at input {wrong}", int(wrong))
            above = partial(self._above, tile)
            firsts = range(0, tile, _ROWS)
            deque((pool.map if pool else map)(above, firsts), maxlen=0)  # to the end, and raises what a thread raised

    def _above(self, tile: int, first: int) -> None:
        self._rows(*self._arguments, tile, first, min(_ROWS, tile - first))


def matrix_of(library: ctypes.CDLL, factor: Factor) -> Floats:
    """U of a factor as a matrix, float32 [n, n]."""
    matrix = np.empty((factor.n, factor.n), np.float32)
    unpack: Any = library.imatrix_runner_factor_unpack
    unpack.argtypes, unpack.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), None
    unpack(factor.panels.ctypes.data, factor.n, matrix.ctypes.data)
    return matrix
