"""Audit job: for each tensor of a file, how many of its rows are those that each candidate makes of the source.

Rows are quantised by the functions of the single pass, so what is compared are llama-quantize's bytes. Sampled rows follow from
the job's seed and the tensor's name alone. Sums come in the order of rows, whatever the number of threads.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.audit_jobs import (
    WITHOUT,
    AuditCandidate,
    AuditJob,
    AuditTensor,
    CandidateFindings,
    TensorFindings,
)
from imatrix_runner.engines.files.imatrix_weights import Values, read_weights
from imatrix_runner.engines.protocol import Audited, Send, TensorAudited
from imatrix_runner.engines.roundings import STOCK, Rounding
from imatrix_runner.engines.worker.cost.rounding import Doing, refusing, report_aborts
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.llama_context import usable_cpus
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type, are_extreme_weights, is_extreme
from imatrix_runner.engines.worker.quantize.gguf_headers import SourceHeader, SourceTensor
from imatrix_runner.engines.worker.quantize.native_kernels import prepare
from imatrix_runner.engines.worker.quantize.rounding.row_rounder import RowRounder, expert_rows
from imatrix_runner.engines.worker.quantize.slabs import address, fill, memory
from imatrix_runner.engines.worker.quantize.work_list import weights_key, weights_wanted
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.errors import RunnerError
from imatrix_runner.events import Progress

Floats = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]

SLAB = 1 << 17
"""Elements of a slab; at least one row."""

_RUNS = 8
"""Runs of neighbouring rows that a sample consists of: a disk reads them faster than single rows."""

_FEWEST_ROWS = 4
_AHEAD = 2
_PROGRESS_SECONDS = 0.2
_EQUAL, _BITS, _ERROR, _OWN, _DOT, _SQUARES, _OWN_DOT, _OWN_SQUARES, _NORM = range(9)


def audit_tensors(job: AuditJob, send: Send) -> None:
    """Send the findings of each tensor, in the job's order, then whether it was all; at a stop those that are complete."""
    with refusing("comparing a file with its source", job.files[0]):
        try:
            send(Audited(_run(job, send)))
        except RunnerError as error:
            raise Refusal(error.what, error.why, error.todo, error.exit_code) from error


@dataclass(frozen=True)
class _Way:
    """One distinct way in which a tensor is made: the values of the imatrix, if any, and the rounding."""

    values: Values | None
    extreme: bool
    rounding: Rounding


@dataclass(frozen=True)
class _Tensor:
    """A tensor to compare. ``ways``: the distinct ones; ``of``: each candidate with its way's place."""

    name: str
    source: SourceTensor
    own: SourceTensor
    ways: tuple[_Way, ...]
    of: tuple[tuple[AuditCandidate, int], ...]
    runs: tuple[range, ...]

    @property
    def kept(self) -> bool:
        return self.source.kind == self.own.kind

    @property
    def rows(self) -> int:
        return sum(map(len, self.runs))


@dataclass(frozen=True)
class _AuditSlab:
    tensor: _Tensor
    rows: range
    last: bool


@dataclass(frozen=True)
class _Setting:
    """What all threads share."""

    job: AuditJob
    source: SourceHeader
    own: SourceHeader
    kernels: Kernels
    rounder: RowRounder
    matrices: tuple[Mapping[bytes, Values], ...]

    def tensor(self, wanted: AuditTensor) -> _Tensor:
        source, own = self.source.tensors.get(wanted.name), self.own.tensors.get(wanted.name)
        if source is None or own is None or source.shape != own.shape:
            raise Refusal.invalid(
                f"{self.job.files[0].name} was not made from {self.job.sources[0].name}",
                f"{wanted.name} is not in both, or has another shape",
                "Name the model that it was made from with --source.",
            )
        ways: dict[tuple[str, Rounding], int] = {}
        made: list[_Way] = []
        of: list[tuple[AuditCandidate, int]] = []
        for candidate in wanted.candidates if self._can_be_made(source, own) else ():
            values = self._values(candidate.matrix, wanted.name, source)
            if values is not None and not np.isfinite(values).all():
                continue  # llama-quantize refuses it
            if values is None and self.kernels.needs_weights(own.kind) and own.kind != source.kind:
                continue
            key = (weights_key(own.kind, values), candidate.rounding)
            if key not in ways:
                ways[key] = len(made)
                extreme = values is not None and are_extreme_weights(values)
                made.append(_Way(values, extreme, candidate.rounding))
            of.append((candidate, ways[key]))
        if source.kind == own.kind:
            made, of = [_Way(None, False, STOCK)], [(AuditCandidate(WITHOUT), 0)]
        return _Tensor(wanted.name, source, own, tuple(made), tuple(of), tuple(self._runs(wanted.name, source)))

    def _can_be_made(self, source: SourceTensor, own: SourceTensor) -> bool:
        flat = len(source.shape) < 4 or source.shape[3] == 1
        return flat and self.kernels.can_widen(source.kind) and self.kernels.can_widen(own.kind)

    def _values(self, matrix: int, name: str, tensor: SourceTensor) -> Values | None:
        values = self.matrices[matrix].get(name.encode()) if matrix != WITHOUT else None
        return values if values is not None and values.size == weights_wanted(tensor) else None

    def _runs(self, name: str, tensor: SourceTensor) -> Iterator[range]:
        """The rows to look at, in order, in runs of at most a slab."""
        step = max(1, SLAB // tensor.n_per_row)
        for run in sampled_rows(name, tensor.rows, tensor.n_per_row, self.job.sample, self.job.seed):
            for first in range(run.start, run.stop, step):
                yield range(first, min(first + step, run.stop))

    def prepare(self) -> None:
        """Make the kernels ready for the types that are compared."""
        pairs: set[tuple[Type, bool]] = set()
        others: set[tuple[Type, Rounding]] = set()
        for wanted in self.job.tensors:
            tensor = self.tensor(wanted)
            if not tensor.kept:
                pairs |= {(tensor.own.kind, way.values is not None) for way in tensor.ways}
                others |= {(tensor.own.kind, way.rounding) for way in tensor.ways}
        prepare(self.kernels, self.job.native, pairs)
        self.rounder.prepare(others)


def sampled_rows(name: str, rows: int, n_per_row: int, sample: int | None, seed: int) -> list[range]:
    """The rows of a tensor to look at, as runs in order, that do not overlap; ``sample``: about so many elements, None: all."""
    wanted = rows if sample is None else max(_FEWEST_ROWS, sample // max(1, n_per_row))
    if wanted >= rows:
        return [range(rows)]
    runs = min(_RUNS, wanted)
    random = np.random.default_rng([seed & 0xFFFFFFFF, zlib.crc32(name.encode())])
    found = []
    for number in range(runs):
        begin, end = rows * number // runs, rows * (number + 1) // runs
        length = wanted * (number + 1) // runs - wanted * number // runs
        first = begin + int(random.integers(0, end - begin - length + 1))
        found.append(range(first, first + length))
    return found


def _run(job: AuditJob, send: Send) -> bool:
    """Returns false if a stop ended it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    library, stop = load(), StdinStop()
    doing: Doing = {}
    report_aborts(library, doing, send)
    kernels = Kernels(library)
    threads = max(1, job.threads or usable_cpus())
    rounder = RowRounder(kernels, job.native, job.covariances, threads)
    matrices = tuple(read_weights(path).values for path in job.matrices)
    source, own = SourceHeader.open(job.sources, kernels), SourceHeader.open(job.files, kernels)
    setting = _Setting(job, source, own, kernels, rounder, matrices)
    setting.prepare()

    def slabs() -> Iterator[_AuditSlab]:
        for wanted in job.tensors:
            tensor = setting.tensor(wanted)
            for number, rows in enumerate(tensor.runs):
                if stop.requested:
                    return
                yield _AuditSlab(tensor, rows, number + 1 == len(tensor.runs))

    done, reported, count = 0, 0.0, 0
    total = sum(own.tensors[wanted.name].n_elements for wanted in job.tensors if wanted.name in own.tensors)
    sums, invalid = np.zeros((0, 9)), 0
    for slab, (added, bad) in _Comparers(setting, threads, doing).map(slabs()):
        tensor = slab.tensor
        first = slab.rows is tensor.runs[0]
        sums, invalid = (added, bad) if first else (sums + added, invalid + bad)
        if slab.last:
            send(TensorAudited(_findings(tensor, sums, invalid)))
            done, count = done + tensor.own.n_elements, count + 1
        if (now := time.monotonic()) - reported >= _PROGRESS_SECONDS:
            reported = now
            send(Progress(job.step, done, total, tensor.name))
    return count == len(job.tensors)


def _findings(tensor: _Tensor, sums: Sums, invalid: int) -> TensorFindings:
    found = tuple(_candidate(candidate, sums[way]) for candidate, way in tensor.of)
    own = tensor.own
    kinds = (own.kind.name, tensor.source.kind.name)
    return TensorFindings(tensor.name, *kinds, tensor.rows, own.rows, own.n_elements, tensor.kept, invalid, found)


def _candidate(candidate: AuditCandidate, sums: Sums) -> CandidateFindings:
    norm = sums[_NORM]

    def correlation(dot: float, squares: float) -> float:
        return float(dot / np.sqrt(norm * squares)) if norm > 0 and squares > 0 else 0.0

    return CandidateFindings(
        candidate,
        int(sums[_EQUAL]),
        int(sums[_BITS]),
        float(sums[_ERROR]),
        float(sums[_OWN]),
        correlation(sums[_DOT], sums[_SQUARES]),
        correlation(sums[_OWN_DOT], sums[_OWN_SQUARES]),
    )


class _Comparer:
    """One thread's memory and files."""

    def __init__(self, setting: _Setting, doing: Doing) -> None:
        self._setting, self._kernels, self._doing = setting, setting.kernels, doing
        self._open: dict[Path, FileIO] = {}
        self._raw, self._file, self._wide, self._out, self._back, self._theirs = (memory(0) for _ in range(6))

    def close(self) -> None:
        for file in self._open.values():
            file.close()

    def compare(self, slab: _AuditSlab) -> tuple[Sums, int]:
        """float64 [n_ways, 9] and the number of invalid rows of the slab."""
        tensor, count = slab.tensor, len(slab.rows)
        size = count * tensor.own.kind.row_bytes(tensor.own.n_per_row)
        self._make_room(4 * count * tensor.own.n_per_row)
        self._read(self._setting.own.files, tensor.own, slab.rows, self._file)
        self._read(self._setting.source.files, tensor.source, slab.rows, self._raw)
        theirs = self._file[:size].reshape(count, -1)
        valid = self._valid_rows(tensor.own.kind, self._file, count, size)
        sums = np.zeros((len(tensor.ways), 9))
        if tensor.kept:
            self._add(sums[0], slab, theirs, self._raw[:size].reshape(count, -1), valid, None)
            return sums, int(count - valid.sum())
        source_bytes = count * tensor.source.kind.row_bytes(tensor.source.n_per_row)
        if not self._kernels.valid(tensor.source.kind, address(self._raw), source_bytes):
            raise Refusal.invalid(
                f"{self._setting.job.sources[0].name} is damaged",
                f"{tensor.name} has NaN or infinite numbers",
                "Download or convert the source again.",
            )
        numbers = self._floats(tensor.source.kind, self._raw, self._wide, count, tensor.source.n_per_row)
        extreme = self._kernels.has_native and is_extreme(numbers)
        for way, row in zip(tensor.ways, sums, strict=True):
            self._doing[threading.get_ident()] = (tensor.name, tensor.own.kind)
            self._setting.rounder.round(
                tensor.name,
                tensor.source,
                tensor.own.kind,
                way.rounding,
                slab.rows,
                address(numbers),
                address(self._out),
                way.values,
                extreme=extreme or way.extreme,
            )
            self._add(row, slab, theirs, self._out[:size].reshape(count, -1), valid, (numbers, way))
        return sums, int(count - valid.sum())

    def _add(
        self,
        sums: Sums,
        slab: _AuditSlab,
        theirs: npt.NDArray[np.uint8],
        made: npt.NDArray[np.uint8],
        valid: npt.NDArray[np.bool_],
        rounded: tuple[Floats, _Way] | None,
    ) -> None:
        """Add what one way made of a slab. ``rounded``: the source's numbers and the way; None for what is copied."""
        other = (theirs != made).any(axis=1)
        sums[_EQUAL] += len(other) - int(other.sum())
        if not other.any():
            return
        sums[_BITS] += int(np.unpackbits(theirs[other] ^ made[other]).sum())
        some = np.flatnonzero(other & valid)
        if rounded is None or not some.size:
            return
        numbers, way = rounded
        kind, count, n = slab.tensor.own.kind, len(slab.rows), slab.tensor.own.n_per_row
        have = self._floats(kind, self._file, self._theirs, count, n)[some].astype(np.float64)
        own = self._floats(kind, self._out, self._back, count, n)[some].astype(np.float64)
        before = numbers[some].astype(np.float64)
        weights = self._importance(slab, way)[some] if way.values is not None else np.ones(1)
        sums[_ERROR] += float((weights * (have - before) ** 2).sum())
        sums[_OWN] += float((weights * (own - before) ** 2).sum())
        sums[_DOT] += float((have * before).sum())
        sums[_SQUARES] += float((have * have).sum())
        sums[_OWN_DOT] += float((own * before).sum())
        sums[_OWN_SQUARES] += float((own * own).sum())
        sums[_NORM] += float((before * before).sum())

    def _importance(self, slab: _AuditSlab, way: _Way) -> npt.NDArray[np.float64]:
        """float64 [rows, n_per_row]: what each number of the slab counts."""
        assert way.values is not None
        tensor, n = slab.tensor.source, slab.tensor.source.n_per_row
        parts = [
            np.broadcast_to(way.values[expert * n : (expert + 1) * n].astype(np.float64), (len(rows), n))
            for expert, rows in expert_rows(tensor, slab.rows)
        ]
        return np.concatenate(parts)

    def _valid_rows(self, kind: Type, data: npt.NDArray[np.uint8], count: int, size: int) -> npt.NDArray[np.bool_]:
        """Which rows have finite numbers and scales; ggml prints the reason for those that do not."""
        if self._kernels.valid(kind, address(data), size):
            return np.ones(count, np.bool_)
        each, start = size // count, address(data)
        return np.array([self._kernels.valid(kind, start + row * each, each) for row in range(count)], np.bool_)

    def _floats(self, kind: Type, data: npt.NDArray[np.uint8], room: npt.NDArray[np.uint8], rows: int, n: int) -> Floats:
        if kind.name == "f32":
            room = data
        else:
            self._kernels.widen(kind, address(data), address(room), rows * n)
        numbers: Floats = room[: 4 * rows * n].view(np.float32).reshape(rows, n)
        return numbers

    def _read(self, files: Sequence[Path], tensor: SourceTensor, rows: range, into: npt.NDArray[np.uint8]) -> None:
        row_bytes, path = tensor.kind.row_bytes(tensor.n_per_row), files[tensor.file]
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = path.open("rb", buffering=0)
        fill(file, into, tensor.offset + rows.start * row_bytes, len(rows) * row_bytes)

    def _make_room(self, n_bytes: int) -> None:
        # Types of 8 bytes an element (F64, I64) are only ever copied.
        if self._raw.size < 2 * n_bytes:
            self._raw, self._file = memory(2 * n_bytes), memory(2 * n_bytes)
            self._wide, self._out, self._back, self._theirs = (memory(n_bytes) for _ in range(4))


@dataclass
class _Comparers:
    """Threads that compare slabs; results come in the slabs' order."""

    setting: _Setting
    threads: int
    doing: Doing
    free: SimpleQueue[_Comparer] = field(default_factory=SimpleQueue)

    def map(self, slabs: Iterator[_AuditSlab]) -> Iterator[tuple[_AuditSlab, tuple[Sums, int]]]:
        comparers = [_Comparer(self.setting, self.doing) for _ in range(self.threads)]
        for each in comparers:
            self.free.put(each)

        def one(slab: _AuditSlab) -> tuple[Sums, int]:
            comparer = self.free.get()
            try:
                return comparer.compare(slab)
            finally:
                self.free.put(comparer)

        begun: list[tuple[_AuditSlab, Future[tuple[Sums, int]]]] = []
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for slab in slabs:
                    begun.append((slab, pool.submit(one, slab)))
                    if len(begun) > _AHEAD * self.threads:
                        slab, future = begun.pop(0)
                        yield slab, future.result()
                for slab, future in begun:
                    yield slab, future.result()
            finally:
                pool.shutdown(cancel_futures=True)
                for each in comparers:
                    each.close()
