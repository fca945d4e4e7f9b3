"""Processes slabs in parallel threads: read, widen, quantise to every wanted type, write to every output.

A slab is small enough to stay in a core's cache while it is quantised to one type after another, so the model is read and
widened once. Threads take slabs across tensors, so none waits at a tensor's end. Quantising works row by row, so cutting a
tensor into slabs changes no byte.
"""

from __future__ import annotations

import errno
import os
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

_READS_AT = hasattr(os, "preadv")

SLAB = 1 << 18
"""Elements of a slab: 1 MiB as float32."""

_MANY, _AT_ONCE = 32, 4
"""From so many threads on, each takes so many slabs at a time. A thread's slabs take a third of a second at most, which is how
long the others may wait for it at the end."""


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


def slabs_at_once(threads: int) -> int:
    """How many slabs a thread takes at a time: where many threads compute, several, because only one thread at a time executes
    Python (``scripts/bench scaling``)."""
    return _AT_ONCE if threads >= _MANY else 1


class Slabs:
    """Hands out slabs to threads, in order, until ``stopped`` returns true; at most ``at_once`` of one work at a time."""

    def __init__(self, works: Iterable[Work], stopped: Callable[[], bool], at_once: int = 1) -> None:
        self._slabs = _cut(works, at_once)
        self._stopped = stopped
        self._lock = threading.Lock()

    def take(self) -> tuple[Work, range] | None:
        """A work and the first rows of slabs of it."""
        with self._lock:
            return None if self._stopped() else next(self._slabs, None)


def _cut(works: Iterable[Work], at_once: int) -> Iterator[tuple[Work, range]]:
    for work in works:
        slabs = work.slabs
        for place in range(0, len(slabs), at_once):
            yield work, slabs[place : place + at_once]


class Buffer:
    """Memory of ``size`` bytes, with its address, which takes as long to ask for as a call of a kernel."""

    def __init__(self, size: int) -> None:
        self.array = memory(size)
        self.address = address(self.array)
        self.view = memoryview(self.array)


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
        self._raw = Buffer(max((rows[w.name] * w.tensor.kind.row_bytes(w.tensor.n_per_row) for w in works), default=0))
        self._wide = Buffer(4 * max((rows[w.name] * w.tensor.n_per_row for w in works), default=0))
        sizes = [rows[w.name] * part.kind.row_bytes(w.tensor.n_per_row) for w in works for part in w.parts]
        self._out = Buffer(max(sizes, default=0))
        self._numbers, self._extreme = self._wide, False
        self._files: dict[Path, FileIO] = {}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def process(self, work: Work, first: int) -> None:
        """Process all parts of the slab that begins at row ``first``. Outputs with invalid data are spoiled."""
        # Only one thread at a time executes Python, so each step here counts (scripts/bench scaling).
        count = min(work.rows, work.tensor.rows - first)
        wanted = [part for part in work.parts if part.is_wanted]
        if any(not part.copies for part in wanted) and not self._read(work, first, count):
            for part in work.parts:
                _spoil(part, work.name, "the model has NaN or infinite numbers there")
            return
        if any(work.computes(part) for part in wanted):
            self._widen(work, count)
        for part in wanted:
            data = self._make(work, part, first, count)
            if data is None:
                _spoil(part, work.name, f"quantised to {part.kind.name} it has NaN or infinite numbers")
                continue
            began = time.perf_counter()
            part.crcs[first] = zlib.crc32(data)
            part.write(first * part.kind.row_bytes(work.tensor.n_per_row), data)
            self.spent.writing += time.perf_counter() - began

    def _read(self, work: Work, first: int, count: int) -> bool:
        """Read the slab from the model; false if its data is invalid."""
        tensor = work.tensor
        row_bytes = tensor.kind.row_bytes(tensor.n_per_row)
        began = time.perf_counter()
        self._fill(self._raw, self._source.files[tensor.file], tensor.offset + first * row_bytes, count * row_bytes)
        read = time.perf_counter()
        valid = self._kernels.valid(tensor.kind, self._raw.address, count * row_bytes)
        self.spent.reading += read - began
        self.spent.checking += time.perf_counter() - read
        return valid

    def _widen(self, work: Work, count: int) -> None:
        """Convert the slab to float32 in ``_numbers``, and set whether it needs ggml's own kernels."""
        n_elements = count * work.tensor.n_per_row
        began = time.perf_counter()
        self._numbers = self._raw
        if work.tensor.kind.name != "f32":
            self._kernels.widen(work.tensor.kind, self._raw.address, self._wide.address, n_elements)
            self._numbers = self._wide
        self._extreme = self._kernels.has_native and is_extreme(self._numbers.array[: 4 * n_elements].view(np.float32))
        self.spent.widening += time.perf_counter() - began

    def _fill(self, buffer: Buffer, path: Path, offset: int, size: int) -> None:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = path.open("rb", buffering=0)
        fill(file, buffer.view, offset, size)

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
            return self._out.view[:size]
        if not work.computes(part):
            return self._raw.view[:size]
        began = time.perf_counter()
        self._quantise(work, part, first, count)
        quantised = time.perf_counter()
        self.spent.types[part.kind.name] += quantised - began
        valid = self._kernels.valid(part.kind, self._out.address, size)
        self.spent.checking += time.perf_counter() - quantised
        return self._out.view[:size] if valid else None

    def _quantise(self, work: Work, part: TensorWork, first: int, count: int) -> None:
        values = work.weights() if part.weighted else None
        extreme = self._extreme or (values is not None and work.extreme_weights)
        self._doing[threading.get_ident()] = (work, part)
        rows, source, target = range(first, first + count), self._numbers.address, self._out.address
        self._rounder.round(work.name, work.tensor, part.kind, part.rounding, rows, source, target, values, extreme=extreme)


def combine(crcs: dict[int, int]) -> int:
    """The checksum of a tensor from those of its slabs (first row -> CRC-32), in any order."""
    return zlib.crc32(np.array([crcs[first] for first in sorted(crcs)], "<u4").tobytes())


def _spoil(part: TensorWork, tensor: str, why: str) -> None:
    for output, _ in part.targets:
        output.spoiled = output.spoiled or (tensor, why)


def fill(file: FileIO, buffer: Any, offset: int, size: int) -> None:
    """Read ``size`` bytes of a file into the beginning of ``buffer``. Raises ``OSError``, also if the file ends too early."""
    view = memoryview(buffer)[:size]
    end = offset + size
    if not _READS_AT:
        file.seek(offset)
    while view:
        got = os.preadv(file.fileno(), [view], end - len(view)) if _READS_AT else file.readinto(view)
        if not got:
            raise OSError(errno.EIO, f"the file ends before byte {end}", file.name)
        view = view[got:]


def memory(size: int) -> Any:
    return np.empty(max(size, 1), np.uint8)


def address(array: Any) -> int:
    return int(array.ctypes.data)
