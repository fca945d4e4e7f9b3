"""Checks of error feedback that need llama.cpp's libraries: run in a child process, which prints what it found as JSON.

``python -m support.feedback_checks LIBRARY PROOFS CHECK``: the compiled kernels, the file of proofs, and a function below.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imatrix_runner.engines.jobs import Native
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type
from imatrix_runner.engines.worker.quantize.rounding.factor import Factor, Floats, factorise, matrix_of
from imatrix_runner.engines.worker.quantize.rounding.feedback import CODE_BY_CODE, POINT_BY_POINT, FeedbackKernels

FEW_TABLES = (*CODE_BY_CODE, "iq3_xxs", "iq3_s", "iq2_xxs")
"""Types whose tables ggml builds quickly."""

_CANARY = 64


def covariance_of(n: int, seed: int, tokens: int | None = None) -> Floats:
    """Of inputs that have much in common, as those of a model do."""
    random = np.random.default_rng(seed)
    shared = random.standard_normal((n // 8, n)) * np.arange(1, n // 8 + 1)[:, np.newaxis] ** -0.5
    size = random.lognormal(0, 0.5, n)
    count = tokens or 4 * n
    inputs = (random.standard_t(5, (count, n // 8)) @ shared + random.standard_normal((count, n)) * 0.5) * size
    return np.ascontiguousarray(inputs.T @ inputs / count, np.float32)


@dataclass
class Bench:
    """Everything that a check needs."""

    kernels: Kernels
    feedback: FeedbackKernels

    def type(self, name: str) -> Type:
        kind = self.kernels.type(name)
        assert self.feedback.prepare(kind), name
        return kind

    def factor(self, matrix: Floats, damping: float = 0.01) -> Factor:
        return factorise(self.feedback.library, matrix, damping)

    def round(self, kind: Type, rows: Floats, factor: Factor, *, valid: bool = True) -> Any:
        """Blocks with feedback, uint8 [rows, bytes]; asserts that they are valid and no other byte was written."""
        count, n = rows.shape
        size = count * kind.row_bytes(n)
        out = np.full(size + 2 * _CANARY, 0xA5, np.uint8)
        self.feedback.round(kind, rows.ctypes.data, out.ctypes.data + _CANARY, count, n, factor)
        assert (out[:_CANARY] == 0xA5).all()
        assert (out[-_CANARY:] == 0xA5).all()
        made = out[_CANARY:-_CANARY].copy()
        assert not valid or self.kernels.valid(kind, made.ctypes.data, size), kind.name
        return made.reshape(count, -1)

    def stock(self, kind: Type, rows: Floats, weights: Floats, *, extreme: bool = False) -> Any:
        count, n = rows.shape
        out = np.zeros((count, kind.row_bytes(n)), np.uint8)
        self.kernels.quantize(kind, rows.ctypes.data, out.ctypes.data, count, n, weights.ctypes.data, extreme=extreme)
        return out

    def widen(self, kind: Type, blocks: Any) -> Floats:
        numbers = np.empty((len(blocks), blocks.shape[1] // kind.size * kind.block), np.float32)
        self.kernels.widen(kind, blocks.ctypes.data, numbers.ctypes.data, numbers.size)
        return numbers

    def errors(self, kind: Type, rows: Floats, blocks: Any, matrix: Floats) -> Any:
        """e H e^T of every row, float64 [rows]."""
        left = (rows - self.widen(kind, blocks)).astype(np.float64)
        return ((left @ matrix.astype(np.float64)) * left).sum(axis=1)


def rows_of(count: int, n: int, seed: int) -> Floats:
    return (np.random.default_rng(seed).standard_t(6, (count, n)) * 0.03).astype(np.float32)


def proofs(bench: Bench) -> dict[str, bool]:
    """Whether each type is proven."""
    return {name: bench.feedback.prepare(bench.kernels.type(name)) for name in FEW_TABLES}


def three_proofs(bench: Bench) -> dict[str, bool]:
    """The same for three types only."""
    return {name: bench.feedback.prepare(bench.kernels.type(name)) for name in ("q4_K", "q6_K", "q8_0")}


def packers(bench: Bench) -> dict[str, bool]:
    """Whether blocks mean to ggml what they do here, also for types whose tables ggml builds slowly."""
    return {name: bench.feedback.agrees(bench.kernels.type(name)) for name in (*CODE_BY_CODE, *POINT_BY_POINT)}


def ratios(bench: Bench) -> dict[str, tuple[float, float]]:
    """The error relative to ggml's with an imatrix: on the covariance itself, and on that of other tokens."""
    matrix, other = covariance_of(512, 1), covariance_of(512, 1, 3000)
    rows, factor = rows_of(40, 512, 2), bench.factor(matrix)
    found = {}
    for name in FEW_TABLES:
        kind = bench.type(name)
        stock, ours = bench.stock(kind, rows, np.diagonal(matrix).copy()), bench.round(kind, rows, factor)
        each = [bench.errors(kind, rows, ours, h).sum() / bench.errors(kind, rows, stock, h).sum() for h in (matrix, other)]
        found[name] = (float(each[0]), float(each[1]))
    return found


def unrelated(bench: Bench) -> dict[str, float]:
    """Without anything in common there is nothing to feed back. The greatest error of a block relative to ggml's, where errors
    weigh alike; scales are chosen by trying, so it may be less."""
    rows, factor = rows_of(40, 256, 3), bench.factor(np.eye(256, dtype=np.float32) * np.float32(7))
    found = {}
    for name in FEW_TABLES:
        kind = bench.type(name)
        stock, ours = bench.stock(kind, rows, factor.weights), bench.round(kind, rows, factor)
        unit = np.eye(256, dtype=np.float32)
        found[name] = float((bench.errors(kind, rows, ours, unit) / bench.errors(kind, rows, stock, unit)).max())
    return found


def nearest(bench: Bench) -> dict[str, float]:
    """How far numbers are from their targets, at most, in steps of their scale; 0.5 but for float32's rounding is the nearest.

    Computed again in double precision from the blocks alone. Numbers beyond a scale's range are left out.
    """
    n, matrix = 320, covariance_of(320, 4)
    rows, factor = rows_of(9, n, 5), bench.factor(matrix)
    u = matrix_of(bench.feedback.library, factor).astype(np.float64)
    found = {}
    for name, levels in (("q4_0", (-8, 7)), ("q5_0", (-16, 15)), ("q8_0", (-127, 127))):
        kind = bench.type(name)
        blocks = bench.round(kind, rows, factor)
        numbers = bench.widen(kind, blocks).astype(np.float64)
        scale = np.repeat(blocks.reshape(9, -1, kind.size)[:, :, :2].copy().view(np.float16)[:, :, 0].astype(float), 32, axis=1)
        error = rows - numbers
        targets = rows + error @ np.triu(u, 1)
        level = numbers / scale
        inside = (level > levels[0] + 0.5) & (level < levels[1] - 0.5)
        found[name] = float((np.abs(targets - numbers) / np.abs(scale))[inside].max())
    return found


def divisions(bench: Bench) -> dict[str, bool]:
    """Whether rows in slabs of any size, and in threads, have the same bytes as all at once."""
    rows, factor = rows_of(75, 512, 6), bench.factor(covariance_of(512, 7))
    found = {}
    with ThreadPoolExecutor(3) as pool:
        for name in FEW_TABLES:
            kind = bench.type(name)
            whole = bench.round(kind, rows, factor)
            slabs = [rows[:1], rows[1:2], rows[2:19], rows[19:60], rows[60:]]
            made = list(pool.map(lambda slab: bench.round(kind, np.ascontiguousarray(slab), factor), slabs))  # noqa: B023
            found[name] = np.array_equal(np.concatenate(made), whole)
    return found


def digests(bench: Bench) -> dict[str, str]:
    """A hash of the factor, and of the bytes of every type."""
    rows, factor = rows_of(20, 512, 12), bench.factor(covariance_of(512, 13))
    made = {name: bench.round(bench.type(name), rows, factor) for name in FEW_TABLES}
    parts = {"factor": factor.panels, "weights": factor.weights, **made}
    return {name: hashlib.sha256(part.tobytes()).hexdigest() for name, part in parts.items()}


def unusual(bench: Bench) -> dict[str, list[str]]:
    """What went wrong with unusual rows and covariances; every call also checks validity and canaries."""
    n = 512
    plain, few = covariance_of(n, 8), covariance_of(n, 9, 20)
    dead = plain.copy()
    dead[[0, 5, 300]] = 0
    dead[:, [0, 5, 300]] = 0
    great = plain.copy()
    great[7] *= 1e3
    great[:, 7] *= 1e3
    rows = rows_of(21, n, 10)
    rows[0] = 0
    rows[1] = 1
    rows[2, ::3] = 0
    rows[3, 256:] = 0
    rows[4] *= 1e-30
    rows[5] *= 1e4
    rows[6, 40] = 50
    rows[7] *= 10.0 ** np.random.default_rng(11).uniform(-20, 3, n).astype(np.float32)
    rows[9, :32] = 0
    rows[10] = np.abs(rows[10])
    found: dict[str, list[str]] = {}
    for name in FEW_TABLES:
        kind = bench.type(name)
        wrong = found[name] = []
        for label, matrix in (("plain", plain), ("few tokens", few), ("dead inputs", dead), ("a great input", great)):
            factor = bench.factor(matrix)
            numbers = bench.widen(kind, blocks := bench.round(kind, rows, factor))
            if not np.isfinite(numbers).all():
                wrong.append(f"{label}: not finite")
            if numbers[0].any():
                wrong.append(f"{label}: zeros")
            alone = bench.round(kind, np.ascontiguousarray(rows[12:13]), factor)
            if not np.array_equal(alone[0], blocks[12]):
                wrong.append(f"{label}: other rows matter")
        beyond = rows[10:14].copy()
        beyond[1, 77] = 3e8  # only ggml's own function takes that, and makes infinite scales of it
        made = bench.round(kind, beyond, factor, valid=False)
        if not np.array_equal(made[1:2], bench.stock(kind, beyond[1:2], factor.weights, extreme=True)):
            wrong.append("extreme numbers")
        if not np.array_equal(made[[0, 2, 3]], bench.round(kind, beyond[[0, 2, 3]], factor)):
            wrong.append("extreme numbers of another row matter")
    return found


CHECKS: dict[str, Callable[[Bench], Any]] = {
    each.__name__: each for each in (proofs, three_proofs, packers, ratios, unrelated, nearest, divisions, digests, unusual)
}


def main(library: str, proofs_file: str, *names: str) -> None:
    kernels = Kernels(load())
    bench = Bench(kernels, FeedbackKernels(Native(Path(library), Path(proofs_file)), kernels))
    print(json.dumps({name: CHECKS[name](bench) for name in names}))


if __name__ == "__main__":
    main(*sys.argv[1:])
