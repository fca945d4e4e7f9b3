"""Checks a finished output completely: its numbers must be finite, and its bytes those that were written."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.engines.files import ledger
from imatrix_runner.engines.jobs import CheckJob
from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.engines.protocol import Checked, Send
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.llama_context import usable_cpus
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels
from imatrix_runner.engines.worker.quantize.slabs import SLAB, address, combine, fill, memory
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.errors import RunnerError, from_os_error
from imatrix_runner.events import Progress
from imatrix_runner.models.gguf_file import TensorInfo, read_header


def check_rows(job: CheckJob, send: Send) -> None:
    """Send the first invalid tensor and why, or that there is none. Raises :class:`Refusal`."""
    try:
        found = ledger.read(job.ledger) if job.ledger is not None else None
        entries = {(entry.file, entry.offset): entry for entry in found[1].values()} if found is not None else {}
        reading = _Reading(job.files, Kernels(load()), found[0].slab if found is not None else SLAB, entries)
        stop = StdinStop()
        bad = reading.run(job.threads, stop, lambda done: send(Progress(job.step, done)))
        if not stop.requested:
            send(Checked(*bad))
    except RunnerError as error:
        raise Refusal(error.what, error.why, error.todo, error.exit_code) from error
    except OSError as error:
        failure = from_os_error(error, "checking a level", error.filename or job.files[0])
        raise Refusal(failure.what, failure.why, failure.todo, failure.exit_code) from error


def bad_tensor(library: Library, files: tuple[Path, ...], threads: int | None, stop: StdinStop) -> str:
    """The name of the first tensor with NaN or infinite numbers; empty if there is none, or after a stop."""
    return _Reading(files, Kernels(library), SLAB, {}).run(threads, stop, lambda _done: None)[0]


@dataclass(frozen=True)
class _Reading:
    files: tuple[Path, ...]
    kernels: Kernels
    slab: int
    entries: dict[tuple[int, int], LedgerEntry]

    def run(self, threads: int | None, stop: StdinStop, on_progress: Callable[[int], None]) -> tuple[str, str]:
        """The first invalid tensor and why; both empty if there is none. ``on_progress`` gets the number of bytes done."""
        done, bad = 0, ("", "")
        with ThreadPoolExecutor(max(1, threads or usable_cpus())) as pool:
            tensors = list(self.tensors())
            for (_, _, tensor), why in zip(tensors, pool.map(lambda entry: self.wrong(entry, stop), tensors), strict=True):
                done += tensor.n_bytes or 0
                on_progress(done)
                if why and not bad[1]:
                    bad = (tensor.name, why)
        return bad

    def tensors(self) -> Iterator[tuple[int, int, TensorInfo]]:
        """Yield each tensor with the number of its file and its offset there."""
        for index, path in enumerate(self.files):
            header = read_header(path)
            for tensor in header.tensors:
                yield index, header.data_offset + tensor.offset, tensor

    def wrong(self, placed: tuple[int, int, TensorInfo], stop: StdinStop) -> str:
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
        return "its bytes differ from those that were written" if entry is not None and entry.crc != combine(crcs) else ""
