"""One slab at a time, by as many threads as asked for: read, widen, quantise to every type wanted, write to every output.

A slab is small enough to stay in a core's cache while the types take turns, so the model is read and widened once; threads take
the next slab of whatever tensor is next, so none waits at a tensor's end. Quantising is row by row, so cutting changes no byte.
"""

from __future__ import annotations

import errno
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from imatrix_runner.engines.embedded.headers import Source
from imatrix_runner.engines.embedded.kernels import Kernels, is_wild
from imatrix_runner.engines.embedded.workload import Part, Work

SLAB = 1 << 18
"""Elements of a slab: 1 MiB as float32."""


@dataclass
class Spent:
    """Seconds of threads, by what they were spent on."""

    types: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    reading: float = 0.0
    widening: float = 0.0
    checking: float = 0.0
    writing: float = 0.0

    def add(self, other: Spent) -> None:
        for name, seconds in other.types.items():
            self.types[name] += seconds
        self.reading += other.reading
        self.widening += other.widening
        self.checking += other.checking
        self.writing += other.writing


class Slabs:
    """Hands out slabs, in order, to whoever asks; and stops doing so when told."""

    def __init__(self, works: Sequence[Work], stopped: Callable[[], bool]) -> None:
        self._slabs: Iterator[tuple[Work, int]] = ((work, first) for work in works for first in work.slabs)
        self._stopped = stopped
        self._lock = threading.Lock()

    def take(self) -> tuple[Work, int] | None:
        with self._lock:
            return None if self._stopped() else next(self._slabs, None)


Doing = dict[int, tuple[Work, Part]]
"""Thread -> what it quantises at the moment: for whoever hears that ggml is about to abort the process."""


class Worker:
    """One thread's memory, files and times. The memory is as large as the largest slab of ``works`` needs."""

    def __init__(self, source: Source, works: Sequence[Work], kernels: Kernels, doing: Doing) -> None:
        self._source, self._kernels, self._doing = source, kernels, doing
        self.spent = Spent()
        rows = {work.name: min(work.rows, work.tensor.rows) for work in works}
        self._raw = memory(max((rows[w.name] * w.tensor.kind.row_bytes(w.tensor.n_per_row) for w in works), default=0))
        self._wide = memory(4 * max((rows[w.name] * w.tensor.n_per_row for w in works), default=0))
        sizes = [rows[w.name] * part.kind.row_bytes(w.tensor.n_per_row) for w in works for part in w.parts]
        self._out = memory(max(sizes, default=0))
        self._numbers, self._wild = self._wide, False
        self._files: dict[Path, FileIO] = {}

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def process(self, work: Work, first: int) -> None:
        """All parts of the slab that begins at row ``first``. Outputs that something is wrong with are spoiled."""
        count = min(work.rows, work.tensor.rows - first)
        if any(part.alive and not part.copies for part in work.parts) and not self._read(work, first, count):
            for part in work.parts:
                _spoil(part, work.name, "the model has NaN or infinite numbers there")
            return
        if any(part.alive and work.computes(part) for part in work.parts):
            self._widen(work, count)
        for part in work.parts:
            if alive := part.alive:
                data = self._make(work, part, first, count)
                if data is None:
                    _spoil(part, work.name, f"quantised to {part.kind.name} it has NaN or infinite numbers")
                    continue
                began = time.perf_counter()
                part.crcs[first] = zlib.crc32(data)
                offset = first * part.kind.row_bytes(work.tensor.n_per_row)
                for output, place in alive:
                    output.write(place, offset, data)
                self.spent.writing += time.perf_counter() - began

    def _read(self, work: Work, first: int, count: int) -> bool:
        """The slab as it lies in the model; false where that is invalid."""
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
        """The slab as float32, in ``_numbers``; and whether our own kernels may have it."""
        n_elements = count * work.tensor.n_per_row
        began = time.perf_counter()
        self._numbers = self._raw
        if work.tensor.kind.name != "f32":
            self._kernels.widen(work.tensor.kind, address(self._raw), address(self._wide), n_elements)
            self._numbers = self._wide
        self._wild = self._kernels.has_own and is_wild(self._numbers[: 4 * n_elements].view(np.float32))
        self.spent.widening += time.perf_counter() - began

    def _fill(self, buffer: Any, path: Path, offset: int, size: int) -> None:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = path.open("rb", buffering=0)
        fill(file, buffer, offset, size)

    def _make(self, work: Work, part: Part, first: int, count: int) -> memoryview | None:
        """The slab in the part's type; None if it is invalid."""
        n_per_row = work.tensor.n_per_row
        row_bytes = part.kind.row_bytes(n_per_row)
        size = count * row_bytes
        if part.copies:
            copy = part.copies[0]
            began = time.perf_counter()
            with suppress(OSError):  # what cannot be read does not have its checksum
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

    def _quantise(self, work: Work, part: Part, first: int, count: int) -> None:
        n_per_row, per_expert = work.tensor.n_per_row, work.tensor.rows_per_expert
        values = work.weights() if part.weighted else None
        wild = self._wild or (values is not None and work.wild_weights)
        source, target, row_bytes = address(self._numbers), address(self._out), part.kind.row_bytes(n_per_row)
        self._doing[threading.get_ident()] = (work, part)
        row = 0
        while row < count:
            # Each expert has its own weights.
            expert, inside = divmod(first + row, per_expert)
            rows = count if values is None else min(count - row, per_expert - inside)
            weights = None if values is None else address(values) + 4 * expert * n_per_row
            into = target + row * row_bytes
            self._kernels.quantize(part.kind, source + 4 * row * n_per_row, into, rows, n_per_row, weights, wild=wild)
            row += rows


def combine(crcs: dict[int, int]) -> int:
    """The checksum of a tensor from those of its slabs, whatever order they were made in."""
    return zlib.crc32(np.array([crcs[first] for first in sorted(crcs)], "<u4").tobytes())


def _spoil(part: Part, tensor: str, why: str) -> None:
    for output, _ in part.targets:
        output.spoiled = output.spoiled or (tensor, why)


def fill(file: FileIO, buffer: Any, offset: int, size: int) -> None:
    """``size`` bytes of a file into the beginning of ``buffer``. Raises ``OSError``, also when the file ends before."""
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
