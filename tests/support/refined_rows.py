"""Rows of many kinds, rounded by ggml and by the refined searches, and the errors of both. For a process with the library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type
from imatrix_runner.engines.worker.quantize.rounding.refined import RefinedKernels

TYPES = (
    *("q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "iq4_xs"),
    *("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s"),
)

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.float64]


def samples(random: np.random.Generator, rows: int, columns: int) -> Iterator[tuple[str, Floats, Floats | None]]:
    """Yield a name, rows and weights of every kind."""
    shape = (rows, columns)
    normal = random.standard_normal(shape)
    sparse = np.where(random.random(shape) < 0.5, normal, 0)
    sparse[:, :256] = 0
    sparse[::2, -64:-32] = 0
    kinds = {
        "normal": 0.02 * normal,
        "heavy": 0.02 * random.standard_t(2, shape),
        "positive": np.abs(normal),
        "sparse": sparse,
        "steps": np.repeat(random.standard_normal((rows, columns // 32)), 32, axis=1),
        "spread": normal * 2.0 ** random.integers(-40, 12, (rows, columns // 64)).repeat(64, axis=1),
        "outliers": np.where(random.random(shape) < 0.01, 100 * normal, normal),
        "coarse": np.round(normal * 4) / 4,
        "shifted": 3 + 0.01 * normal,
        "tiny": normal * 1e-18,
        "huge": normal * 1e4,
        "constant": np.full(shape, -0.7),
    }
    weights = random.lognormal(0, 1, columns)
    given = {
        "lognormal": weights,
        "some": np.where(random.random(columns) < 0.3, 0, weights),
        "wide": 10.0 ** random.uniform(-6, 6, columns),
        "none": None,
        "zero": np.zeros(columns),
    }
    for kind, numbers in kinds.items():
        for name, values in given.items():
            floats = None if values is None else values.astype(np.float32)
            yield f"{kind}, {name} weights", np.ascontiguousarray(numbers, np.float32), floats


def made(kind: Type, rows: Floats) -> Bytes:
    """An output for rows, with a canary on either side of what is written."""
    return np.full(rows.shape[0] * kind.row_bytes(rows.shape[1]) + 128, 0xA5, np.uint8)


def address(values: npt.NDArray[np.generic] | None) -> int | None:
    return None if values is None else int(values.ctypes.data)


def by_ggml(kernels: Kernels, kind: Type, rows: Floats, weights: Floats | None) -> Bytes:
    out = made(kind, rows)
    kernels.quantize(kind, rows.ctypes.data, out.ctypes.data + 64, *rows.shape, address(weights))
    return out


def refined(own: RefinedKernels, kind: Type, rows: Floats, weights: Floats | None) -> Bytes:
    out = made(kind, rows)
    own.round(kind, rows.ctypes.data, out.ctypes.data + 64, *rows.shape, address(weights))
    assert (out[:64] == 0xA5).all()
    assert (out[-64:] == 0xA5).all()
    return out


def errors(kernels: Kernels, kind: Type, out: Bytes, rows: Floats, weights: Floats | None) -> Sums:
    """The weighted squared error of each block, in float64 [rows, blocks]."""
    values = np.empty_like(rows)
    kernels.widen(kind, out.ctypes.data + 64, values.ctypes.data, values.size)
    squares = (rows.astype(np.float64) - values) ** 2
    if weights is not None:
        squares *= weights
    return squares.reshape(rows.shape[0], -1, kind.block).sum(2)


@dataclass
class Compared:
    """Sums over samples of one type: blocks; blocks and rows with a higher error than ggml's; relative errors by sample."""

    blocks: int = 0
    worse: int = 0
    changed: int = 0
    invalid: list[str] = field(default_factory=list)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    ggml_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, kernels: Kernels, own: RefinedKernels, kind: Type, sample: str, rows: Floats, weights: Floats | None) -> None:
        began = time.thread_time()
        theirs = by_ggml(kernels, kind, rows, weights)
        between = time.thread_time()
        ours = refined(own, kind, rows, weights)
        self.ggml_seconds += between - began
        self.seconds += time.thread_time() - between
        before, after = (errors(kernels, kind, out, rows, weights) for out in (theirs, ours))
        self.blocks += before.size
        self.worse += int((after > before).sum()) + int((after.sum(1) > before.sum(1)).sum())
        self.changed += int((after < before).sum())
        if not kernels.valid(kind, ours.ctypes.data + 64, ours.size - 128):
            self.invalid.append(sample)
        if before.sum():
            self.ratios.setdefault(sample, []).append(float(after.sum() / before.sum()))
