"""Adds X^T X of rows of activations to sums, with the compiled kernel (``quantize/native/gram.c``), in which every row has the
same weight: it is scaled so that its mean square is 1."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.covariance_jobs import triangle
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.refusal import Refusal

_MOST_ROWS = 512
"""Rows that are packed at a time: 29 MB where they are 14,336 wide. A multiple of the kernel's 128, which changes no sum."""

_AGREE = 1e-5
"""Largest difference of the kernel from exact sums, relative to the norms of both columns; its float32 sums of 128 rows may be
off by 7.7e-6."""

Offsets = npt.NDArray[np.int64]

Sums = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Rows of float32, each at ``base`` plus its offset in ``at`` (bytes), and the ``sums`` float64 [triangle(n)] of x x^T that
    they are added to once scaled."""

    base: int
    at: Offsets
    sums: Sums


class GramKernel:
    """Adds with the threads of ``pool``. Every sum has one order of operations, whatever their number. Raises :class:`Refusal`
    if there is no kernel, or it adds wrongly."""

    def __init__(self, native: Native | None, pool: Executor, threads: int) -> None:
        if native is None:
            raise _unusable("there is no compiled kernel")
        library = ctypes.CDLL(str(native.library))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._size: Any = library.imatrix_runner_gram_packed
        self._scale: Any = library.imatrix_runner_gram_scales
        self._pack: Any = library.imatrix_runner_gram_pack
        self._add: Any = library.imatrix_runner_gram_add
        self._size.argtypes, self._size.restype = (number, number), number
        self._scale.argtypes, self._scale.restype = (pointer, pointer, number, number, pointer, number, number), None
        self._pack.argtypes, self._pack.restype = (pointer, pointer, pointer, number, number, pointer, number, number), None
        self._add.argtypes, self._add.restype = (pointer, number, number, pointer, number, number), None
        self._pool, self._threads = pool, threads
        self._packed = np.empty(0, np.float32)
        self._check()

    def add(self, blocks: Sequence[Rows], n: int) -> None:
        """Add the products of all blocks, whose rows are ``n`` wide; no two have the same sums."""
        if len(blocks) >= 2 * self._threads:  # experts: one thread for each
            list(self._pool.map(lambda rows: self._alone(rows, n), blocks))
            return
        for rows in blocks:
            self._together(rows, n)

    def _alone(self, rows: Rows, n: int) -> None:
        """Add a block in this thread."""
        packed = np.empty(self._size(min(len(rows.at), _MOST_ROWS), n), np.float32)
        for first in range(0, len(rows.at), _MOST_ROWS):
            at = rows.at[first : first + _MOST_ROWS]
            scales = np.empty(len(at), np.float32)
            self._scale(rows.base, at.ctypes.data, len(at), n, scales.ctypes.data, 0, 1)
            self._pack(rows.base, at.ctypes.data, scales.ctypes.data, len(at), n, packed.ctypes.data, 0, 1)
            self._add(packed.ctypes.data, len(at), n, rows.sums.ctypes.data, 0, 1)

    def _together(self, rows: Rows, n: int) -> None:
        """Add a block in all threads, each with some tiles of the sums."""
        for first in range(0, len(rows.at), _MOST_ROWS):
            at = rows.at[first : first + _MOST_ROWS]
            size = self._size(len(at), n)
            if len(self._packed) < size:
                self._packed = np.empty(size, np.float32)
            packed, sums, scales = self._packed.ctypes.data, rows.sums.ctypes.data, np.empty(len(at), np.float32)
            self._share(self._scale, rows.base, at.ctypes.data, len(at), n, scales.ctypes.data)
            self._share(self._pack, rows.base, at.ctypes.data, scales.ctypes.data, len(at), n, packed)
            self._share(self._add, packed, len(at), n, sums)

    def _share(self, function: Any, *arguments: int) -> None:
        """Call a function of the kernel in all threads, each with its part of the work."""
        list(self._pool.map(lambda part: function(*arguments, part, self._threads), range(self._threads)))

    def _check(self) -> None:
        """Compare the kernel with exact sums of a few numbers, because a compiler may be wrong."""
        n, n_rows = 67, 200
        random = np.random.default_rng(1)
        values = (random.standard_normal((n_rows, n)) * np.exp(random.standard_normal((n_rows, 1)))).astype(np.float32)
        sums = np.zeros(triangle(n))
        self.add([Rows(values.ctypes.data, np.arange(n_rows, dtype=np.int64) * values.strides[0], sums)], n)
        scaled = values / np.sqrt(np.square(values, dtype=np.float64).mean(axis=1, keepdims=True))
        exact = np.einsum("ki,kj->ij", scaled, scaled, optimize=False)
        norms = np.sqrt(np.diag(exact))
        upper = np.triu_indices(n)
        if not (np.abs(sums - exact[upper]) <= _AGREE * np.outer(norms, norms)[upper]).all():
            raise _unusable("the compiled kernel adds wrongly: its compiler has a fault")


def _unusable(why: str) -> Refusal:
    return Refusal("Covariances cannot be collected", why, "Install gcc or clang, or name another compiler with CC.", 3)


def rows_of(values: npt.NDArray[np.float32]) -> tuple[int, npt.NDArray[np.int64]]:
    """The address of ``values`` [ne3, ne2, ne1, ne0], whose rows are contiguous, and each row's offset [ne3, ne2, ne1]."""
    s3, s2, s1, _ = values.strides
    n3, n2, n1, _ = values.shape
    at: npt.NDArray[np.int64] = (
        np.arange(n3, dtype=np.int64)[:, None, None] * s3 + np.arange(n2)[:, None] * s2 + np.arange(n1) * s1
    )
    return values.ctypes.data, at
