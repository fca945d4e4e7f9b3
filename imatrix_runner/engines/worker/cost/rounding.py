"""Rounds slabs of tensors in parallel threads: read from the model, widen, quantise, and widen what was quantised.

Slabs have a fixed number of elements, and their results come in order, so that nothing depends on the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingErrorsJob, TrialsJob
from imatrix_runner.engines.files.imatrix_weights import Values, read_weights
from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.engines.protocol import Send
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.llama_context import usable_cpus
from imatrix_runner.engines.worker.quantize import llama_quantize
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels, Type, are_extreme_weights, is_extreme
from imatrix_runner.engines.worker.quantize.gguf_headers import SourceHeader, SourceTensor
from imatrix_runner.engines.worker.quantize.native_kernels import prepare
from imatrix_runner.engines.worker.quantize.overrides import NotAccepted
from imatrix_runner.engines.worker.quantize.rounding.row_rounder import RowRounder
from imatrix_runner.engines.worker.quantize.slabs import address, fill, memory
from imatrix_runner.engines.worker.quantize.work_list import EMBEDDINGS, weights_wanted
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.errors import EngineError, from_os_error

Floats = npt.NDArray[np.float32]

Bytes = npt.NDArray[np.uint8]

SLAB = 1 << 17
"""Elements of a slab: half a MiB as float32, so that it stays in a core's cache."""

_ELEMENT_BYTES = 24
"""Memory of a slab for each element: source, float32, quantised and rounded numbers, and one float64."""

_AHEAD = 2
"""Slabs begun for each thread before the first of them is taken."""

_WHAT = "A tensor cannot be rounded"


@dataclass(frozen=True)
class Part:
    """A type that a tensor is rounded to, and the values of the imatrix to round with, if any."""

    wanted: RoundedTensor
    kind: Type
    weights: Values | None
    extreme: bool


@dataclass(frozen=True)
class Slab:
    """Some rows of a tensor, and what they are rounded to. ``importance``: one float32 for every column (of every expert) to
    weigh errors with; None: all alike."""

    name: str
    tensor: SourceTensor
    rows: range
    parts: tuple[Part, ...]
    importance: Values | None = None

    @property
    def n_elements(self) -> int:
        return len(self.rows) * self.tensor.n_per_row


@dataclass(frozen=True)
class Source:
    """The model to round, and the imatrix: ``chosen`` values to round with, and ``all_values``."""

    header: SourceHeader
    kernels: Kernels
    rounder: RowRounder
    chosen: Mapping[bytes, Values]
    all_values: Mapping[bytes, Values]

    @classmethod
    def open(cls, library: Library, files: Sequence[Path], job: RoundingErrorsJob | TrialsJob) -> Source:
        kernels = Kernels(library)
        options = QuantizeOptions(include_weights=job.include_weights, exclude_weights=job.exclude_weights)
        chosen = llama_quantize.chosen_weights(job.imatrix, options)
        values = chosen.values if chosen is not None else {}
        threads = job.options.threads if isinstance(job, TrialsJob) else job.threads
        rounder = RowRounder(kernels, job.native, job.covariances, max(1, threads or usable_cpus()))
        everything = read_weights(job.imatrix).values if job.imatrix else {}
        return cls(SourceHeader.open(files, kernels), kernels, rounder, values, everything)

    def tensor(self, name: str) -> SourceTensor:
        """Raises :class:`Refusal` if the model has no such tensor."""
        try:
            return self.header.tensors[name]
        except KeyError:
            raise _refusal(name, f"{self.header.files[0].name} has no tensor of this name") from None

    def check(self, wanted: Sequence[RoundedTensor], *, in_place: bool = False) -> None:
        """Raise :class:`Refusal` if a tensor cannot be rounded as wanted; ggml would abort. ``in_place``: rounded numbers must
        fit in the tensor's own type."""
        for each in wanted:
            tensor, kind = self.tensor(each.name), self.kernels.type(each.type)
            if not tensor.n_elements:
                raise _refusal(each.name, "it is empty")
            if len(tensor.shape) > 3 and tensor.shape[3] > 1:
                raise _refusal(each.name, "it has four dimensions")
            if not self.kernels.can_widen(tensor.kind):
                raise _refusal(each.name, f"ggml cannot convert from {tensor.kind.name}")
            if in_place and tensor.kind.is_quantised:
                raise _refusal(each.name, f"its own type, {tensor.kind.name}, does not hold rounded numbers")
            if not self.kernels.can_widen(kind):
                raise _refusal(each.name, f"ggml cannot convert from {kind.name}")
            if tensor.n_per_row % kind.block:
                raise _refusal(
                    each.name, f"its rows of {tensor.n_per_row} do not divide into {kind.name}'s blocks of {kind.block}"
                )
            if self.kernels.needs_weights(kind) and not (each.weighted and self._is_known(each.name, tensor)):
                raise _refusal(each.name, f"ggml does not quantise to {kind.name} without data of an imatrix")

    def _is_known(self, name: str, tensor: SourceTensor) -> bool:
        return name.encode() in self.chosen and self.weights(name, tensor) is not None

    def prepare(self, job: RoundingErrorsJob | TrialsJob, wanted: Sequence[RoundedTensor]) -> None:
        """Make the kernels ready for types, which takes seconds for some of them."""
        pairs = {(each.type, each.weighted and each.name.encode() in self.chosen) for each in wanted}
        prepare(self.kernels, job.native, {(self.kernels.type(name), weighted) for name, weighted in pairs})
        self.rounder.prepare({(self.kernels.type(each.type), each.rounding) for each in wanted})

    def weights(self, name: str, tensor: SourceTensor) -> Values | None:
        """The values to round a tensor with."""
        return _fitting(self.chosen, name, tensor)

    def slabs(self, wanted: Sequence[RoundedTensor]) -> Iterator[Slab]:
        """Cut a tensor into slabs of :data:`SLAB` elements, or of one row. ``wanted``: all for the same tensor."""
        name = wanted[0].name
        tensor = self.tensor(name)
        weights = self.weights(name, tensor) if any(each.weighted for each in wanted) else None
        extreme = weights is not None and are_extreme_weights(weights)
        parts = tuple(
            Part(each, self.kernels.type(each.type), *((weights, extreme) if each.weighted else (None, False)))
            for each in wanted
        )
        importance = self._importance(name, tensor)
        step = slab_rows(tensor)
        for first in range(0, tensor.rows, step):
            yield Slab(name, tensor, range(first, min(first + step, tensor.rows)), parts, importance)

    def _importance(self, name: str, tensor: SourceTensor) -> Values | None:
        """The values to weigh a tensor's errors with; None if the imatrix has none, or NaN (in an excluded entry)."""
        values = _fitting(self.all_values, name, tensor)
        return values if values is not None and np.isfinite(values).all() else None


def slab_rows(tensor: SourceTensor) -> int:
    return max(1, min(tensor.rows, SLAB // tensor.n_per_row))


def _fitting(values: Mapping[bytes, Values], name: str, tensor: SourceTensor) -> Values | None:
    """A tensor's values, None if there are none. Raises :class:`Refusal` for another number of them, as llama-quantize does; it
    ignores them only for embeddings."""
    given, want = values.get(name.encode()), weights_wanted(tensor)
    if given is None or given.size == want:
        return given
    if name in EMBEDDINGS:
        return None
    raise _refusal(name, f"the imatrix has {given.size} values for it instead of {want}")


Doing = dict[int, tuple[str, Type]]
"""Thread -> the tensor that it is quantising, and to which type."""


class Rounder:
    """One thread's memory and files."""

    def __init__(self, source: Source, n_elements: int, doing: Doing) -> None:
        self._files, self._kernels, self._rounder, self._doing = source.header.files, source.kernels, source.rounder, doing
        self._raw, self._wide, self._out, self._back = (memory(4 * n_elements) for _ in range(4))
        self._open: dict[Path, FileIO] = {}
        self._numbers: Floats = self._wide.view(np.float32)
        self._rounded: Floats = self._numbers
        self._extreme = False

    def close(self) -> None:
        for file in self._open.values():
            file.close()

    def read(self, slab: Slab) -> memoryview:
        """The slab's bytes in the model, valid until the next call. Raises :class:`Refusal` for NaN and infinity."""
        tensor = slab.tensor
        row_bytes = tensor.kind.row_bytes(tensor.n_per_row)
        size, path = len(slab.rows) * row_bytes, self._files[tensor.file]
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = path.open("rb", buffering=0)
        fill(file, self._raw, tensor.offset + slab.rows.start * row_bytes, size)
        self._require_numbers(slab, tensor.kind, self._raw, "the model has NaN or infinite numbers there")
        return memoryview(self._raw)[:size]

    def widen(self, slab: Slab) -> Floats:
        """The numbers of the slab that was read last, float32 [rows, n_per_row], valid until the next call."""
        numbers = self._as_floats(slab, slab.tensor.kind, self._raw, self._wide)
        self._extreme = self._kernels.has_native and is_extreme(numbers)
        self._numbers = numbers
        return numbers

    def round(self, slab: Slab, part: Part) -> Floats:
        """The same numbers, rounded; valid until the next call."""
        self._doing[threading.get_ident()] = (slab.name, part.kind)
        source, target, extreme = address(self._numbers), address(self._out), self._extreme or part.extreme
        self._rounder.round(
            slab.name, slab.tensor, part.kind, part.wanted.rounding, slab.rows, source, target, part.weights, extreme=extreme
        )
        self._require_numbers(slab, part.kind, self._out, f"quantised to {part.kind.name} it has NaN or infinite numbers")
        self._rounded = self._as_floats(slab, part.kind, self._out, self._back)
        return self._rounded

    def narrow(self, slab: Slab) -> memoryview:
        """The rounded numbers in the tensor's own type, which is not quantised; valid until the next call."""
        kind, n_per_row = slab.tensor.kind, slab.tensor.n_per_row
        self._kernels.quantize(kind, address(self._rounded), address(self._raw), len(slab.rows), n_per_row, None)
        self._require_numbers(slab, kind, self._raw, f"rounded, its numbers exceed {kind.name}")
        return memoryview(self._raw)[: len(slab.rows) * kind.row_bytes(n_per_row)]

    def _require_numbers(self, slab: Slab, kind: Type, data: Bytes, why: str) -> None:
        if not self._kernels.valid(kind, address(data), len(slab.rows) * kind.row_bytes(slab.tensor.n_per_row)):
            raise _refusal(slab.name, why)

    def _as_floats(self, slab: Slab, kind: Type, data: Bytes, room: Bytes) -> Floats:
        """Numbers of the type ``kind`` as float32 [rows, n_per_row], in ``room`` unless they are float32 already."""
        if kind.name == "f32":
            room = data
        else:
            self._kernels.widen(kind, address(data), address(room), slab.n_elements)
        return _rows(room, slab)


def _rows(data: Bytes, slab: Slab) -> Floats:
    numbers: Floats = data[: 4 * slab.n_elements].view(np.float32).reshape(len(slab.rows), -1)
    return numbers


Result = TypeVar("Result")


@dataclass(frozen=True)
class Rounders:
    """Threads that work on slabs."""

    pool: ThreadPoolExecutor
    threads: int
    free: SimpleQueue[Rounder] = field(default_factory=SimpleQueue)

    def map(self, work: Callable[[Rounder, Slab], Result], slabs: Iterable[Slab]) -> Iterator[tuple[Slab, Result]]:
        """Yield each slab with the result of ``work``, in order. What ``work`` returns must not be a rounder's memory."""

        def one(slab: Slab) -> Result:
            rounder = self.free.get()
            try:
                return work(rounder, slab)
            finally:
                self.free.put(rounder)

        begun: deque[tuple[Slab, Future[Result]]] = deque()
        for slab in slabs:
            begun.append((slab, self.pool.submit(one, slab)))
            if len(begun) > _AHEAD * self.threads:
                slab, future = begun.popleft()
                yield slab, future.result()
        for slab, future in begun:
            yield slab, future.result()


@contextmanager
def open_rounders(
    source: Source, wanted: Iterable[str], threads: int, doing: Doing, buffer_bytes: int | None = None
) -> Iterator[Rounders]:
    """Threads for slabs of the tensors ``wanted``: fewer than ``threads`` if the bound on memory requires it."""
    tensors = map(source.tensor, set(wanted))
    n_elements = max((slab_rows(tensor) * tensor.n_per_row for tensor in tensors), default=0)
    if buffer_bytes is not None and n_elements:
        threads = max(1, min(threads, buffer_bytes // (_ELEMENT_BYTES * n_elements)))
    with ThreadPoolExecutor(threads) as pool:
        rounders = [Rounder(source, n_elements, doing) for _ in range(threads)]
        made = Rounders(pool, threads)
        for rounder in rounders:
            made.free.put(rounder)
        try:
            yield made
        finally:
            pool.shutdown(cancel_futures=True)
            for rounder in rounders:
                rounder.close()


@contextmanager
def refusing(doing: str, place: Path) -> Iterator[None]:
    """Raise errors of the imatrix's options and of files as :class:`Refusal`. ``doing``: a gerund phrase."""
    try:
        yield
    except NotAccepted as refused:
        llama_quantize.say(f"{refused}\n")  # the parent explains it like llama-quantize's own message
        raise Refusal.failed("llama.cpp does not accept an option", str(refused)) from refused
    except OSError as error:
        failure = from_os_error(error, doing, error.filename or place)
        raise Refusal(failure.what, failure.why, failure.todo, failure.exit_code) from error


def report_aborts(library: Library, doing: Doing, send: Send) -> None:
    """Before ggml aborts the process, send which tensor and type it could not quantise."""

    def aborting(message: bytes) -> None:
        llama_quantize.write(message + b"\n")
        if (found := doing.get(threading.get_ident())) is not None:
            name, kind = found
            reason = message.decode("utf-8", "replace").strip().rpartition(": ")[2]
            send(_refusal(name, f"ggml aborted while quantising it to {kind.name}: {reason}").reply)
            os._exit(EngineError.exit_code)

    llama_quantize.on_abort(library, aborting)


def _refusal(name: str, why: str) -> Refusal:
    return Refusal.invalid(_WHAT, f"{name}: {why}", "Leave the tensor or the type out, or give an imatrix that fits the model.")
