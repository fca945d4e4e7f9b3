"""Refined searches: ggml's blocks, improved for a lower weighted error, never a higher one.

The search itself is native/refined.c; docs/kernels.md, "Refined search", says what it does. Before it is used for a type, the
numbers that it reads from blocks are compared with those of ggml's own dequantisation.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.kernel_proofs import recall_proofs, remember_proofs
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.quantize.ggml_rows import Floats, Kernels, Type, are_extreme_weights, is_extreme
from imatrix_runner.engines.worker.quantize.native_kernels import POINTS, dimensions, read_points

Bytes = npt.NDArray[np.uint8]

_POINTER, _I64 = ctypes.c_void_p, ctypes.c_int64

_PROOF_BLOCKS = 512

_DEATHS = 2
"""A proof is not begun again after this many processes died in it."""


class RefinedKernels:
    """The refined searches of one compiled library. A type is used only after :meth:`prepare` has returned true for it."""

    def __init__(self, native: Native, kernels: Kernels) -> None:
        self._library = ctypes.CDLL(str(native.library))
        self._kernels = kernels
        self._path = native.proofs
        self._functions: dict[str, Any] = {}

    def serves(self, kind: Type) -> bool:
        """Whether there is a refined search for a type; :meth:`prepare` says whether it is right on this machine."""
        return hasattr(self._library, f"refine_{kind.name}")

    def prepare(self, kind: Type) -> bool:
        """Prove that the search reads and writes a type's blocks as ggml does; false if it does not.

        Call it before other threads round to that type, and after native_kernels.py has prepared the type.
        """
        if not self.serves(kind):
            return False
        if kind.name in self._functions:
            return True
        name = f"refine_{kind.name}"
        proofs = recall_proofs(self._path)
        if name in proofs.refuted or proofs.trying.count(name) >= _DEATHS:
            return False
        if name not in proofs.proven:
            proofs.trying.append(name)
            remember_proofs(self._path, proofs)
            right = self._set_grid(kind) and self._agrees(kind)
            proofs = recall_proofs(self._path)
            proofs.trying = [each for each in proofs.trying if each != name]
            (proofs.proven if right else proofs.refuted).append(name)
            remember_proofs(self._path, proofs)
        else:
            right = self._set_grid(kind)
        if right:
            function = getattr(self._library, name)
            function.argtypes, function.restype = (_POINTER, _POINTER, _I64, _I64, _POINTER), _I64
            self._functions[kind.name] = function
        return right

    def round(self, kind: Type, source: int, target: int, rows: int, n_per_row: int, weights: int | None) -> None:
        """Round ``rows`` rows of ``n_per_row`` float32 at the address ``source`` to blocks at ``target``.

        ``weights``: the address of one float32 for each column; None weighs all columns alike. Blocks with numbers that are too
        large for a search (:func:`is_extreme`), and all blocks if a weight is, are ggml's. Bytes do not depend on how rows are
        divided among calls. Releases the GIL.
        """
        wild = weights is not None and are_extreme_weights(_floats(weights, n_per_row))
        extreme = wild or is_extreme(_floats(source, rows * n_per_row))
        self._kernels.quantize(kind, source, target, rows, n_per_row, weights, extreme=extreme)
        if not wild:
            self._functions[kind.name](source, target, rows, n_per_row, weights)

    def _set_grid(self, kind: Type) -> bool:
        """Give the search the points of a type that has a grid; false if they cannot be used."""
        if kind.name not in POINTS:
            return True
        take = self._library.imatrix_runner_refined_grid
        take.argtypes, take.restype = (ctypes.c_int, ctypes.c_int, _POINTER), ctypes.c_int
        points = read_points(self._kernels, kind)
        return not take(POINTS[kind.name], dimensions(kind), points.ctypes.data)

    def _agrees(self, kind: Type) -> bool:
        """Whether random blocks mean the same numbers, to the bit, as in ggml, and can be written again as they were."""
        reread = getattr(self._library, f"reread_{kind.name}")
        reread.argtypes, reread.restype = (_POINTER, _POINTER, _POINTER, _I64), None
        blocks = _random_blocks(self._kernels, kind)
        again = np.zeros_like(blocks)
        own, expected = np.empty((2, len(blocks) * kind.block), np.float32)
        reread(blocks.ctypes.data, own.ctypes.data, again.ctypes.data, len(blocks))
        self._kernels.widen(kind, blocks.ctypes.data, expected.ctypes.data, expected.size)
        return np.array_equal(own, expected) and np.array_equal(again, blocks)


def _floats(address: int, count: int) -> Floats:
    """The float32 at an address, without a copy."""
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address))


def _random_blocks(kernels: Kernels, kind: Type) -> Bytes:
    """Blocks of random bytes [_PROOF_BLOCKS, bytes of a block] whose numbers are finite."""
    random = np.random.default_rng(20261201)
    drawn = random.integers(0, 256, (8 * _PROOF_BLOCKS, kind.size), np.uint8)
    values = np.empty((len(drawn), kind.block), np.float32)
    kernels.widen(kind, drawn.ctypes.data, values.ctypes.data, values.size)
    return drawn[np.isfinite(values).all(1)][:_PROOF_BLOCKS]
