"""Error feedback: rows are rounded to stock blocks column after column; later columns make up for the errors of earlier ones.

native/feedback.c does it; docs/kernels.md, "Error feedback", has the mathematics. The blocks load in any llama.cpp, but are not
those of llama-quantize.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.kernel_proofs import recall_proofs, remember_proofs
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.quantize.ggml_rows import MOST, Kernels, Type
from imatrix_runner.engines.worker.quantize.native_kernels import read_points
from imatrix_runner.engines.worker.quantize.rounding.factor import Factor, Floats, factorise

CODE_BY_CODE = {
    "q2_K": (80, 82),
    "q3_K": (108,),
    "q4_K": (0, 2),
    "q5_K": (0, 2),
    "q6_K": (208,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
}
"""Types whose numbers are scale * level - low: every code is chosen by feedback. With the places of the half-precision numbers
in a block."""

POINT_BY_POINT = ("iq3_xxs", "iq3_s", "iq2_xxs", "iq2_xs", "iq2_s")
"""Types whose numbers are scale * sign * magnitude with the magnitudes of a grid: every point is chosen by feedback."""

BLOCK_BY_BLOCK = ("iq1_s", "iq1_m")
"""Types for which ggml's search rounds whole blocks, whose errors are fed to later blocks."""

_DEATHS = 2
"""A proof is not begun again after this many processes died in it."""

_PROOF_BLOCKS, _PROOF_ROWS, _PROOF_COLUMNS = 256, 37, 1024


class FeedbackKernels:
    """The native functions of error feedback. A type is used only after :meth:`prepare` has returned true for it."""

    def __init__(self, native: Native, kernels: Kernels) -> None:
        self._library = ctypes.CDLL(str(native.library))
        self._kernels = kernels
        self._path = native.proofs
        self._functions: dict[str, tuple[Any, ...]] = {}
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._codes: Any = self._library.imatrix_runner_feedback
        self._codes.argtypes = (ctypes.c_char_p, *3 * (pointer,), *2 * (size,), *2 * (pointer,))
        self._blocks: Any = self._library.imatrix_runner_feedback_whole
        self._blocks.argtypes = (*2 * (pointer,), size, *2 * (pointer,), *2 * (size,), *2 * (pointer,))
        self._grid: Any = self._library.imatrix_runner_feedback_grid
        self._grid.argtypes = (ctypes.c_char_p, pointer)
        self._values: Any = self._library.imatrix_runner_feedback_values
        self._grid_values: Any = self._library.imatrix_runner_feedback_grid_values
        for function in (self._values, self._grid_values):
            function.argtypes = (ctypes.c_char_p, pointer, size, pointer, pointer)
        self.group_rows: int = self._library.imatrix_runner_feedback_rows()
        """Rows that are rounded side by side: a call with fewer takes as long."""

    @property
    def library(self) -> ctypes.CDLL:
        """The compiled native kernels, for :func:`~.factor.factorise`."""
        return self._library

    def serves(self, kind: Type) -> bool:
        """Whether there is error feedback for a type; :meth:`prepare` says whether it is right on this machine."""
        return kind.name in CODE_BY_CODE or kind.name in POINT_BY_POINT or kind.name in BLOCK_BY_BLOCK

    def prepare(self, kind: Type) -> bool:
        """Build ggml's tables for a type and prove the rounding; false if its bytes do not mean to ggml what they should.

        Call it before other threads round to that type, and after native_kernels.py has installed its kernels.
        """
        if not self.serves(kind):
            return False
        if kind.name in self._functions:
            return True
        self._kernels.prepare(kind)
        name = f"feedback_{kind.name}"
        proofs = recall_proofs(self._path)
        if name in proofs.refuted or proofs.trying.count(name) >= _DEATHS:
            return False
        search = ctypes.cast(self._kernels.search(kind), ctypes.c_void_p).value
        if not self._set_grid(kind):
            return False
        if kind.name not in BLOCK_BY_BLOCK:
            self._functions[kind.name] = (self._codes, kind.name.encode(), search)
        else:
            self._functions[kind.name] = (self._blocks, search, self._kernels.dequantiser(kind), kind.size)
        if name in proofs.proven:
            return True
        proofs.trying.append(name)
        remember_proofs(self._path, proofs)
        right = self._proves(kind)
        proofs = recall_proofs(self._path)
        proofs.trying = [each for each in proofs.trying if each != name]
        (proofs.proven if right else proofs.refuted).append(name)
        remember_proofs(self._path, proofs)
        if not right:
            del self._functions[kind.name]
        return right

    def round(self, kind: Type, source: int, target: int, rows: int, n_per_row: int, factor: Factor) -> None:
        """Round ``rows`` rows of float32 at the address ``source`` to blocks at ``target``. Rows do not depend on one another.

        ``n_per_row`` is the factor's size. A row with numbers for which ggml's search needs its own functions is left to it.
        The call takes about ``16 * group_rows / 4 * n_per_row`` bytes of memory, or raises ``MemoryError``.
        """
        if n_per_row != factor.n:
            raise ValueError(f"rows of {n_per_row} numbers and a covariance of {factor.n} inputs")
        row_bytes = kind.row_bytes(n_per_row)
        for extreme, some in _runs(source, rows, n_per_row):
            numbers, into, count = source + 4 * some.start * n_per_row, target + some.start * row_bytes, len(some)
            if extreme:
                weights = factor.weights.ctypes.data
                self._kernels.quantize(kind, numbers, into, count, n_per_row, weights, extreme=True)
            else:
                self._run(kind, numbers, into, count, factor)

    def _run(self, kind: Type, source: int, target: int, rows: int, factor: Factor) -> None:
        function, *arguments = self._functions[kind.name]
        addresses = factor.panels.ctypes.data, factor.weights.ctypes.data
        if function(*arguments, source, target, rows, factor.n, *addresses):
            raise MemoryError(f"rounding {rows} rows of {factor.n} numbers to {kind.name}")

    def _proves(self, kind: Type) -> bool:
        """Whether blocks mean to ggml what they do here, and whether errors with feedback are smaller than without."""
        return (kind.name in BLOCK_BY_BLOCK or self.agrees(kind)) and self._gains(kind)

    def _set_grid(self, kind: Type) -> bool:
        """Hand over the library's grid of a type that has one; false if it is unlike those of these types."""
        if kind.name not in POINT_BY_POINT:
            return True
        grid = read_points(self._kernels, kind)
        return not self._grid(kind.name.encode(), grid.ctypes.data)

    def agrees(self, kind: Type) -> bool:
        """Whether random blocks have ggml's numbers, to the bit, and are the same bytes when they are put together again."""
        if not self._set_grid(kind):
            return False
        random = np.random.default_rng(20261201)
        blocks = random.integers(0, 256, (_PROOF_BLOCKS, kind.size), np.uint8)
        for place in CODE_BY_CODE.get(kind.name, (0,)):
            scales = random.standard_normal(_PROOF_BLOCKS) * 10.0 ** random.uniform(-7, 3, _PROOF_BLOCKS)
            blocks[:, place : place + 2] = scales.astype("<f2")[:, np.newaxis].view(np.uint8)
        again = np.zeros_like(blocks)
        values, numbers = (np.empty(blocks.shape[0] * kind.block, np.float32) for _ in range(2))
        function = self._values if kind.name in CODE_BY_CODE else self._grid_values
        function(kind.name.encode(), blocks.ctypes.data, len(blocks), values.ctypes.data, again.ctypes.data)
        self._kernels.widen(kind, blocks.ctypes.data, numbers.ctypes.data, numbers.size)
        return np.array_equal(values.view(np.uint32), numbers.view(np.uint32)) and np.array_equal(again, blocks)

    def _gains(self, kind: Type) -> bool:
        """Whether the error e H e^T is smaller than that of ggml's search, on random rows and inputs that are alike."""
        random = np.random.default_rng(20261202)
        shape = (_PROOF_ROWS, _PROOF_COLUMNS)
        rows = random.standard_normal(shape).astype(np.float32)
        place = np.arange(_PROOF_COLUMNS)
        covariance = (0.99 ** np.abs(place[:, np.newaxis] - place)).astype(np.float32)
        factor = factorise(self._library, covariance, 0.01)
        errors = []
        for with_feedback in (False, True):
            out = np.zeros(_PROOF_ROWS * kind.row_bytes(_PROOF_COLUMNS), np.uint8)
            if with_feedback:
                self._run(kind, rows.ctypes.data, out.ctypes.data, _PROOF_ROWS, factor)
            else:
                given = factor.weights.ctypes.data
                self._kernels.quantize(kind, rows.ctypes.data, out.ctypes.data, *shape, given)
            numbers = np.empty(shape, np.float32)
            self._kernels.widen(kind, out.ctypes.data, numbers.ctypes.data, numbers.size)
            left = (rows - numbers).astype(np.float64)
            errors.append(float(np.einsum("ri,ij,rj->", left, covariance, left, optimize=True)))
        return errors[1] < errors[0]


def _runs(source: int, rows: int, n_per_row: int) -> Iterator[tuple[bool, range]]:
    """Split rows of float32 at an address into runs: whether they have numbers beyond :data:`MOST`, and which they are."""
    numbers: Floats = np.ctypeslib.as_array((ctypes.c_float * (rows * n_per_row)).from_address(source))
    by_row = numbers.reshape(rows, n_per_row)
    usual: npt.NDArray[np.bool_] = (by_row.max(axis=1) <= MOST) & (by_row.min(axis=1) >= -MOST)  # false for NaN
    for is_usual, some in groupby(range(rows), lambda row: bool(usual[row])):
        run = list(some)
        yield not is_usual, range(run[0], run[-1] + 1)
