"""Native kernels in a worker: used for a type only after a test has shown that they give ggml's bytes.

The test quantises numbers of many kinds with both and compares the bytes; its result is stored next to the compiled library,
because the same libraries on the same machine give the same result. The kernels of the IQ types need tables of grid points,
which are read from ggml by dequantising, and lists of neighbours, which they build themselves.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.kernel_proofs import recall_proofs, remember_proofs
from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type

_SIGNATURE = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)

_PROOF_ROWS, _PROOF_COLUMNS = 37, 1280  # not multiples of the number of lanes

_DEATHS = 2
"""A kernel is not tested again after this many processes died in its test; one of them may have been killed by a user."""


def prepare(kernels: Kernels, native: Native | None, wanted: Collection[tuple[Type, bool]]) -> float:
    """Install native kernels where they are proven, and build ggml's tables for the other types; returns the seconds.

    ``wanted``: the types to quantise to, each with whether weights are given.
    """
    began = time.monotonic()
    compiled = NativeKernels(native, kernels) if native is not None else None
    for kind, weighted in sorted(wanted, key=lambda pair: pair[0].number):
        if compiled is None or not compiled.install(kind, weighted=weighted):
            kernels.prepare(kind)
    return time.monotonic() - began


class NativeKernels:
    """The kernels of one compiled library."""

    def __init__(self, native: Native, kernels: Kernels) -> None:
        self._library = ctypes.CDLL(str(native.library))
        self._kernels = kernels
        self._path = native.proofs
        self._proofs = recall_proofs(native.proofs)
        self._made: set[str] = set()

    def install(self, kind: Type, *, weighted: bool) -> bool:
        """Make ``kernels`` use the native kernel for a type. Returns false if there is none, its bytes differ, or it is not
        faster."""
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
            remember_proofs(self._path, self._proofs)
            right = self._prove(kind, function, weighted=weighted)
            self._proofs.trying = [each for each in self._proofs.trying if each != name]
            (self._proofs.proven if right else self._proofs.refuted).append(name)
            remember_proofs(self._path, self._proofs)
            if not right:
                return False
        self._kernels.replace(kind, function, weighted=weighted)
        return True

    def _tables(self, kind: Type) -> bool:
        """Build the lists of neighbours of an IQ type, once, from its grid; false if that fails."""
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
        """Whether the kernel gives the same bytes in less time; compiled without vector instructions it would be slower."""
        self._kernels.prepare(kind)
        size = _PROOF_ROWS * kind.row_bytes(_PROOF_COLUMNS)
        native_seconds = ggml_seconds = 0.0
        for rows, weights in _samples():
            native_bytes, ggml_bytes = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
            given = weights.ctypes.data if weighted else None
            began = time.thread_time()
            function(rows.ctypes.data, native_bytes.ctypes.data, _PROOF_ROWS, _PROOF_COLUMNS, given)
            between = time.thread_time()
            self._kernels.quantize(kind, rows.ctypes.data, ggml_bytes.ctypes.data, _PROOF_ROWS, _PROOF_COLUMNS, given)
            native_seconds += between - began
            ggml_seconds += time.thread_time() - between
            if not np.array_equal(native_bytes, ggml_bytes):
                return False
        return native_seconds < ggml_seconds


Floats = npt.NDArray[np.float32]


def _samples() -> Iterator[tuple[Floats, Floats]]:
    """Yield rows and weights of many kinds, which take different paths through the searches."""
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


Levels = npt.NDArray[np.uint8]

POINTS = {"iq2_xxs": 256, "iq2_xs": 512, "iq2_s": 1024, "iq3_xxs": 256, "iq3_s": 512}
"""Type -> number of its grid points."""

_SUPER = 256


def dimensions(kind: Type) -> int:
    """Numbers per grid point."""
    return 8 if kind.name.startswith("iq2") else 4


def read_levels(kernels: Kernels, kind: Type) -> Levels:
    """Every grid point's numbers as levels (0 for the smallest), point after point: uint8 [points * dimensions]."""
    return np.ascontiguousarray(np.unique(read_points(kernels, kind), return_inverse=True)[1].reshape(-1), np.uint8)


def read_points(kernels: Kernels, kind: Type) -> Floats:
    """Every grid point's numbers in a block with scale 1 and sub-blocks' scales 0: float32 [points * dimensions]."""
    points, width = POINTS[kind.name], dimensions(kind)
    index = np.arange(points).reshape(-1, _SUPER // width)
    blocks = np.zeros((len(index), kind.size), np.uint8)
    blocks[:, :2] = np.array([1], np.float16).view(np.uint8)  # the scale; the sub-blocks' scales stay 0, the signs positive
    _PLACERS[kind.name](blocks, index)
    values = np.empty(points * width, np.float32)
    kernels.widen(kind, blocks.ctypes.data, values.ctypes.data, values.size)
    return values


Blocks = npt.NDArray[np.uint8]

Index = npt.NDArray[np.int64]


def _iq2_xxs(blocks: Blocks, index: Index) -> None:
    """Four indices, then four bytes of signs and scale."""
    blocks[:, 2:].reshape(-1, 8, 8)[:, :, :4] = index.reshape(-1, 8, 4)


def _iq2_xs(blocks: Blocks, index: Index) -> None:
    """Words of nine bits of index and seven of signs."""
    blocks[:, 2:66] = index.astype("<u2").view(np.uint8)


def _iq2_s(blocks: Blocks, index: Index) -> None:
    """The low eight bits, the signs, two high bits each."""
    blocks[:, 2:34] = index & 255
    blocks[:, 66:74] = ((index >> 8).reshape(-1, 8, 4) << np.arange(0, 8, 2)).sum(2)


def _iq3_xxs(blocks: Blocks, index: Index) -> None:
    """One byte each."""
    blocks[:, 2:66] = index


def _iq3_s(blocks: Blocks, index: Index) -> None:
    """The low eight bits, then one high bit each."""
    blocks[:, 2:66] = index & 255
    blocks[:, 66:74] = np.packbits((index >> 8).astype(np.uint8), axis=1, bitorder="little")


_PLACERS = {"iq2_xxs": _iq2_xxs, "iq2_xs": _iq2_xs, "iq2_s": _iq2_s, "iq3_xxs": _iq3_xxs, "iq3_s": _iq3_s}
