"""The grid points of the IQ2 and IQ3 types, read back out of the ggml in use: our kernels have no tables of their own.

A block that names the points 0, 1, 2, … is widened by ggml; what comes out are the points, of which only the order of their few
values counts. Layouts: ggml/src/ggml-common.h of llama.cpp (``block_iq2_xxs`` and so on).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.embedded.kernels import Kernels, Type

Levels = npt.NDArray[np.uint8]

POINTS = {"iq2_xxs": 256, "iq2_xs": 512, "iq2_s": 1024, "iq3_xxs": 256, "iq3_s": 512}
"""Type -> how many grid points it has."""

_SUPER = 256


def dimensions(kind: Type) -> int:
    """Numbers per grid point."""
    return 8 if kind.name.startswith("iq2") else 4


def read_levels(kernels: Kernels, kind: Type) -> Levels:
    """Every grid point's numbers as levels (0 for the smallest), point after point; shape ``(points * dimensions,)``."""
    points, width = POINTS[kind.name], dimensions(kind)
    index = np.arange(points).reshape(-1, _SUPER // width)
    blocks = np.zeros((len(index), kind.size), np.uint8)
    blocks[:, :2] = np.array([1], np.float16).view(np.uint8)  # the scale; the sub-blocks' scales stay 0, the signs positive
    _PLACERS[kind.name](blocks, index)
    values = np.empty(points * width, np.float32)
    kernels.widen(kind, blocks.ctypes.data, values.ctypes.data, values.size)
    return np.ascontiguousarray(np.unique(values, return_inverse=True)[1].reshape(-1), np.uint8)


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
