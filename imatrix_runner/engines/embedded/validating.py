"""Read a finished output again, all of it: are its numbers finite, and its bytes those that were written?"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.embedded import ledger
from imatrix_runner.engines.embedded.kernels import Kernels
from imatrix_runner.engines.embedded.library import Library, load
from imatrix_runner.engines.embedded.protocol import Answer, Check, Checked
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.engines.embedded.session import usable_cpus
from imatrix_runner.engines.embedded.slabs import SLAB, address, combine, fill, memory
from imatrix_runner.engines.embedded.stdin import Stop
from imatrix_runner.errors import RunnerError, from_os_error
from imatrix_runner.events import Progress
from imatrix_runner.models.gguf_file import TensorInfo, read_header


def check(request: Check, tell: Callable[[Answer], None]) -> None:
    """Tell what is wrong with the first tensor that is not right, or that all are. Raises :class:`Refusal`."""
    try:
        found = ledger.read(request.ledger) if request.ledger is not None else None
        entries = {(entry.file, entry.offset): entry for entry in found[1].values()} if found is not None else {}
        job = _Job(request.files, Kernels(load()), found[0].slab if found is not None else SLAB, entries)
        stop = Stop()
        bad = job.run(request.threads, stop, lambda done: tell(Progress(request.step, done)))
        if not stop.requested:
            tell(Checked(*bad))
    except RunnerError as error:
        raise Refusal(error.what, error.why, error.todo, error.exit_code) from error
    except OSError as error:
        told = from_os_error(error, "reading a level again", error.filename or request.files[0])
        raise Refusal(told.what, told.why, told.todo, told.exit_code) from error


def bad_tensor(library: Library, files: tuple[Path, ...], threads: int | None, stop: Stop) -> str:
    """The name of the first tensor with NaN or infinite numbers; empty if there is none, or at a stop."""
    return _Job(files, Kernels(library), SLAB, {}).run(threads, stop, lambda _done: None)[0]


@dataclass(frozen=True)
class _Job:
    files: tuple[Path, ...]
    kernels: Kernels
    slab: int
    entries: dict[tuple[int, int], ledger.Entry]

    def run(self, threads: int | None, stop: Stop, hear: Callable[[int], None]) -> tuple[str, str]:
        """The first tensor that is not right, and why; both empty if all are. ``hear`` is told of bytes done."""
        done, bad = 0, ("", "")
        with ThreadPoolExecutor(max(1, threads or usable_cpus())) as pool:
            tensors = list(self.tensors())
            for (_, _, tensor), why in zip(tensors, pool.map(lambda entry: self.wrong(entry, stop), tensors), strict=True):
                done += tensor.n_bytes or 0
                hear(done)
                if why and not bad[1]:
                    bad = (tensor.name, why)
        return bad

    def tensors(self) -> Iterator[tuple[int, int, TensorInfo]]:
        """Number of the file, where in it, and the tensor."""
        for index, path in enumerate(self.files):
            header = read_header(path)
            for tensor in header.tensors:
                yield index, header.data_offset + tensor.offset, tensor

    def wrong(self, placed: tuple[int, int, TensorInfo], stop: Stop) -> str:
        """What is wrong with a tensor; empty if nothing is."""
        index, offset, tensor = placed
        kind = self.kernels.type(tensor.type_name)
        n_per_row = tensor.shape[0] if tensor.shape else 1
        n_rows, row_bytes = tensor.n_elements // max(1, n_per_row), kind.row_bytes(n_per_row)
        step = max(1, self.slab // max(1, n_per_row))
        entry = self.entries.get((index, offset))
        buffer = memory(min(step, n_rows) * row_bytes)
        crcs: dict[int, int] = {}
        with self.files[index].open("rb", buffering=0) as file:
            for first in range(0, max(n_rows, 1), step):
                if stop.requested:
                    return ""
                size = min(step, n_rows - first) * row_bytes
                fill(file, buffer, offset + first * row_bytes, size)
                if entry is not None:
                    crcs[first] = zlib.crc32(memoryview(buffer)[:size])
                if not self.kernels.valid(kind, address(buffer), size):
                    return "it has NaN or infinite numbers"
        return "its bytes are not those that were written" if entry is not None and entry.crc != combine(crcs) else ""
