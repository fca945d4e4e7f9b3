"""Our own kernels in a worker: used for a type only where they were proven to give ggml's bytes.

The proof quantises numbers of many kinds with both and compares; what it found is remembered beside the compiled library, for
the same libraries on the same machine give the same answer. The kernels of the IQ types need tables of grid points, which are
read back out of ggml by dequantising, and lists of neighbours, which they make themselves.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.embedded.compiled import Native, Proofs, recall_proofs
from imatrix_runner.engines.embedded.grids import POINTS, read_levels
from imatrix_runner.engines.embedded.kernels import Kernels, Type
from imatrix_runner.errors import RunnerError
from imatrix_runner.files import write_json

_SIGNATURE = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
_PROOF_ROWS, _PROOF_COLUMNS = 37, 1280  # no whole number of lanes
_DEATHS = 2
"""Processes that may die in a kernel's proof: one could have been killed by somebody, and the next by the kernel."""


class Fast:
    """The kernels of one compiled library."""

    def __init__(self, native: Native, kernels: Kernels) -> None:
        self._library = ctypes.CDLL(str(native.library))
        self._kernels = kernels
        self._path = native.proofs
        self._proofs = recall_proofs(native.proofs)
        self._made: set[str] = set()

    def install(self, kind: Type, *, weighted: bool) -> bool:
        """Have ``kernels`` use ours for a type from now on; false if there is none, or it is not the same or no quicker."""
        name = f"quantize_{kind.name}" + ("" if weighted else "_unweighted")
        function = getattr(self._library, name, None)
        if function is None or name in self._proofs.refuted:
            return False
        function.argtypes, function.restype = _SIGNATURE, ctypes.c_size_t
        if not self._tables(kind):
            return False
        if name not in self._proofs.proven:
            if self._proofs.trying.count(name) >= _DEATHS:
                return False
            self._proofs.trying.append(name)
            _remember(self._path, self._proofs)
            right = self._prove(kind, function, weighted=weighted)
            self._proofs.trying = [each for each in self._proofs.trying if each != name]
            (self._proofs.proven if right else self._proofs.refuted).append(name)
            _remember(self._path, self._proofs)
            if not right:
                return False
        self._kernels.replace(kind, function, weighted=weighted)
        return True

    def _tables(self, kind: Type) -> bool:
        """The lists of neighbours of an IQ type, made once from its grid; false if they cannot be."""
        if kind.name not in POINTS or kind.name in self._made:
            return True
        make = getattr(self._library, f"imatrix_runner_{kind.name[:3]}_tables")
        make.argtypes, make.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_int
        levels = read_levels(self._kernels, kind)
        if make(POINTS[kind.name], levels.ctypes.data):
            return False
        self._made.add(kind.name)
        return True

    def _prove(self, kind: Type, function: Any, *, weighted: bool) -> bool:
        """The same bytes, and sooner: a compiler that has no vectors for the kernels would make them slower."""
        self._kernels.prepare(kind)
        size = _PROOF_ROWS * kind.row_bytes(_PROOF_COLUMNS)
        our_seconds = their_seconds = 0.0
        for rows, weights in _samples():
            ours, theirs = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
            given = weights.ctypes.data if weighted else None
            began = time.thread_time()
            function(rows.ctypes.data, ours.ctypes.data, _PROOF_ROWS, _PROOF_COLUMNS, given)
            between = time.thread_time()
            self._kernels.quantize(kind, rows.ctypes.data, theirs.ctypes.data, _PROOF_ROWS, _PROOF_COLUMNS, given)
            our_seconds += between - began
            their_seconds += time.thread_time() - between
            if not np.array_equal(ours, theirs):
                return False
        return our_seconds < their_seconds


Floats = npt.NDArray[np.float32]


def _samples() -> Iterator[tuple[Floats, Floats]]:
    """Numbers and weights of every kind that takes another way through a search."""
    random = np.random.default_rng(20261122)
    shape = (_PROOF_ROWS, _PROOF_COLUMNS)
    normal = random.standard_normal(shape).astype(np.float32)
    sparse = np.where(random.random(shape) < 0.5, normal, 0)
    sparse[:, :256] = 0
    sparse[::2, 512:544] = 0
    steps = np.repeat(random.standard_normal((_PROOF_ROWS, _PROOF_COLUMNS // 32)), 32, axis=1)
    spread = normal * 2.0 ** random.integers(-40, 20, (_PROOF_ROWS, _PROOF_COLUMNS // 64)).repeat(64, axis=1)
    outlier = np.where(random.random(shape) < 0.01, 100 * normal, normal)
    weights = random.lognormal(0, 1.5, _PROOF_COLUMNS)
    some = np.where(random.random(_PROOF_COLUMNS) < 0.3, 0, weights)
    wide = 10.0 ** random.uniform(-6, 6, _PROOF_COLUMNS)
    heavy = random.standard_t(2, shape)
    coarse = np.round(normal * 4) / 4
    for rows in (normal, np.abs(normal), sparse, steps, spread, outlier, heavy, coarse, normal * 1e-18, normal * 1e4):
        for given in (weights, some, wide, np.ones(_PROOF_COLUMNS)):
            yield np.ascontiguousarray(rows, np.float32), given.astype(np.float32)


def _remember(path: Path, proofs: Proofs) -> None:
    try:
        write_json(path, proofs)
    except RunnerError:
        return  # then it is proven again next time
