"""Processes slabs in parallel threads: read, widen, quantise to every wanted type, write to every output.

A slab is small enough to stay in a core's cache while it is quantised to one type after another, so the model is read and
widened once. Threads take slabs across tensors, so none waits at a tensor's end. Quantising works row by row, so cutting a
tensor into slabs changes no byte.
"""

from __future__ import annotations

import errno
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, is_extreme
from imatrix_runner.engines.worker.quantize.gguf_headers import SourceHeader
from imatrix_runner.engines.worker.quantize.rounding.row_rounder import RowRounder
from imatrix_runner.engines.worker.quantize.work_list import TensorWork, Work

SLAB = 1 << 18
"""Elements of a slab: 1 MiB as float32."""


@dataclass
class Spent:
    """Thread seconds by what they were spent on."""

    types: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    reading: float = 0.0
    widening: float = 0.0
    checking: float = 0.0
    writing: float = 0.0

    @classmethod
    def total(cls, each: Sequence[Spent], without: Spent | None = None) -> Spent:
        """The sum, minus ``without``."""
        total = cls()
        for one, sign in [*((one, 1) for one in each), *([(without, -1)] if without is not None else [])]:
            for name, seconds in list(one.types.items()):  # a thread may be adding a type
                total.types[name] += sign * seconds
            total.reading += sign * one.reading
            total.widening += sign * one.widening
            total.checking += sign * one.checking
            total.writing += sign * one.writing
        return total


class Slabs:
    """Hands out slabs to threads, in order, until ``stopped`` returns true."""

    def __init__(self, works: Iterable[Work], stopped: Callable[[], bool]) -> None:
        self._slabs: Iterator[tuple[Work, int]] = ((work, first) for work in works for first in work.slabs)
        self._stopped = stopped
        self._lock = threading.Lock()

    def take(self) -> tuple[Work, int] | None:
        with self._lock:
            return None if self._stopped() else next(self._slabs, None)


Doing = dict[int, tuple[Work, TensorWork]]
"""Thread -> what it is quantising; read by the callback that ggml calls before it aborts the process."""


class Worker:
    """One thread's buffers, files and times. The buffers are as large as the largest slab of ``works`` needs."""

    def __init__(
        self, source: SourceHeader, works: Sequence[Work], kernels: Kernels, rounder: RowRounder, doing: Doing, spent: Spent
    ) -> None:
        self._source, self._kernels, self._rounder, self._doing = source, kernels, rounder, doing
        self.spent = spent
        rows = {work.name: min(work.rows, work.tensor.rows) for work in works}
        self._raw = memory(max((rows[w.name] * w.tensor.kind.row_bytes(w.tensor.n_per_row) for w in works), default=0))
        self._wide = memory(4 * max((rows[w.name] * w.tensor.n_per_row for w in works), default=0))
        sizes = [rows[w.name] * part.kind.row_bytes(w.tensor.n_per_row) for w in works for part in w.parts]
        self._out = memory(max(sizes, default=0))
        self._numbers, self._extreme = self._wide, False
        self._files: dict[Path, FileIO] = {}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def process(self, work: Work, first: int) -> None:
        """Process all parts of the slab that begins at row ``first``. Outputs with invalid data are spoiled."""
        count = min(work.rows, work.tensor.rows - first)
        if any(part.alive and not part.copies for part in work.parts) and not self._read(work, first, count):
            for part in work.parts:
                _spoil(part, work.name, "the model has NaN or infinite numbers there")
            return
        if any(part.alive and work.computes(part) for part in work.parts):
            self._widen(work, count)
        for part in work.parts:
            if part.alive:
                data = self._make(work, part, first, count)
                if data is None:
                    _spoil(part, work.name, f"quantised to {part.kind.name} it has NaN or infinite numbers")
                    continue
                began = time.perf_counter()
                part.crcs[first] = zlib.crc32(data)
                offset = first * part.kind.row_bytes(work.tensor.n_per_row)
                part.write(offset, data)
                self.spent.writing += time.perf_counter() - began

    def _read(self, work: Work, first: int, count: int) -> bool:
        """Read the slab from the model; false if its data is invalid."""
        tensor = work.tensor
        row_bytes = tensor.kind.row_bytes(tensor.n_per_row)
        began = time.perf_counter()
        self._fill(self._raw, self._source.files[tensor.file], tensor.offset + first * row_bytes, count * row_bytes)
        read = time.perf_counter()
        valid = self._kernels.valid(tensor.kind, address(self._raw), count * row_bytes)
        self.spent.reading += read - began
        self.spent.checking += time.perf_counter() - read
        return valid

    def _widen(self, work: Work, count: int) -> None:
        """Convert the slab to float32 in ``_numbers``, and set whether it needs ggml's own kernels."""
        n_elements = count * work.tensor.n_per_row
        began = time.perf_counter()
        self._numbers = self._raw
        if work.tensor.kind.name != "f32":
            self._kernels.widen(work.tensor.kind, address(self._raw), address(self._wide), n_elements)
            self._numbers = self._wide
        self._extreme = self._kernels.has_native and is_extreme(self._numbers[: 4 * n_elements].view(np.float32))
        self.spent.widening += time.perf_counter() - began

    def _fill(self, buffer: Any, path: Path, offset: int, size: int) -> None:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = path.open("rb", buffering=0)
        fill(file, buffer, offset, size)

    def _make(self, work: Work, part: TensorWork, first: int, count: int) -> memoryview | None:
        """The slab in the part's type; None if it is invalid."""
        n_per_row = work.tensor.n_per_row
        row_bytes = part.kind.row_bytes(n_per_row)
        size = count * row_bytes
        if part.copies:
            copy = part.copies[0]
            began = time.perf_counter()
            with suppress(OSError):  # its checksum will be wrong, so it is done again
                self._fill(self._out, copy.path, copy.offset + first * row_bytes, size)
            self.spent.reading += time.perf_counter() - began
            return memoryview(self._out)[:size]
        if not work.computes(part):
            return memoryview(self._raw)[:size]
        began = time.perf_counter()
        self._quantise(work, part, first, count)
        quantised = time.perf_counter()
        self.spent.types[part.kind.name] += quantised - began
        valid = self._kernels.valid(part.kind, address(self._out), size)
        self.spent.checking += time.perf_counter() - quantised
        return memoryview(self._out)[:size] if valid else None

    def _quantise(self, work: Work, part: TensorWork, first: int, count: int) -> None:
        values = work.weights() if part.weighted else None
        extreme = self._extreme or (values is not None and work.extreme_weights)
        self._doing[threading.get_ident()] = (work, part)
        rows, source, target = range(first, first + count), address(self._numbers), address(self._out)
        self._rounder.round(work.name, work.tensor, part.kind, part.rounding, rows, source, target, values, extreme=extreme)


def combine(crcs: dict[int, int]) -> int:
    """The checksum of a tensor from those of its slabs (first row -> CRC-32), in any order."""
    return zlib.crc32(np.array([crcs[first] for first in sorted(crcs)], "<u4").tobytes())


def _spoil(part: TensorWork, tensor: str, why: str) -> None:
    for output, _ in part.targets:
        output.spoiled = output.spoiled or (tensor, why)


def fill(file: FileIO, buffer: Any, offset: int, size: int) -> None:
    """Read ``size`` bytes of a file into the beginning of ``buffer``. Raises ``OSError``, also if the file ends too early."""
    file.seek(offset)
    view = memoryview(buffer)[:size]
    while view:
        got = file.readinto(view)
        if not got:
            raise OSError(errno.EIO, f"the file ends before byte {offset + size}", file.name)
        view = view[got:]


def memory(size: int) -> Any:
    return np.empty(max(size, 1), np.uint8)


def address(array: Any) -> int:
    return int(array.ctypes.data)
