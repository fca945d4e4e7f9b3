"""The single pass on many workers: a unit is some pairs of a tensor and a type.

A worker that sees the driver's folder writes into the outputs and records it in a ledger of its own. From another the pairs
return, and the driver writes and records them. An ordinary pass of the driver's then takes in all ledgers, and finishes the
levels.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from imatrix_runner.cluster.node_worker import Node, ResultInFile, Task
from imatrix_runner.cluster.ordered_child import OnUnit, OrderedChild
from imatrix_runner.cluster.shared_files import BLOCK, SharedFile, shared_files
from imatrix_runner.cluster.spread_trials import covariance_files
from imatrix_runner.cluster.spreading import FetchedFile, OnNews, OnResult
from imatrix_runner.cluster.worker_rates import WorkerRates, worker_name
from imatrix_runner.engines.files.ledger import Ledger, LedgerHead, part_ledger, read
from imatrix_runner.engines.jobs import LEDGER_NAME, PartEnd, PassedLevel, PassedUnit, PassFigures, PassJob, PassLevel, TypeCost
from imatrix_runner.engines.pass_parts import LedgerEntry, PassPart, PassWork, WrittenPair
from imatrix_runner.engines.roundings import FEEDBACK
from imatrix_runner.errors import EngineError, from_os_error
from imatrix_runner.events import Event, Progress, Sink
from imatrix_runner.files import open_to_overwrite, sync_file
from imatrix_runner.process import Orders

_RECORD_SECONDS = 5.0
"""How often the driver syncs and records what returned; a killed driver loses no more than that."""

NO_FIGURES = PassFigures(0, 0, (), 0, 0, 0, 0, 0)
"""Of a pass that computed nothing."""

OnePassAlone = Callable[[PassJob], tuple[tuple[PassedLevel, ...], PassFigures]]
"""Makes levels on this machine."""


class UnitWorkers(Protocol):
    """What does the units of a task."""

    def spread(self, task: Task, numbers: Sequence[int], on_result: OnResult, on_news: OnNews) -> None: ...


@dataclass(frozen=True)
class PassedShare:
    """A finished unit: who did it, what was written, and the content of its scratch file if that is small; None where the
    outputs hold it already."""

    worker: str
    unit: PassedUnit
    content: bytes | None = None


@dataclass(frozen=True)
class FolderProbe:
    """A file that the driver wrote next to an output: where it is found, the outputs are the driver's."""

    path: Path
    content: str

    def is_here(self) -> bool:
        try:
            return self.path.read_text(encoding="ascii") == self.content
        except (OSError, UnicodeDecodeError):
            return False


@dataclass(frozen=True)
class PassTask:
    """``job`` as the driver would do it; the files of the model, its imatrix and its covariances; what its workers compute."""

    job: PassJob
    units: tuple[tuple[PassWork, ...], ...]
    slab: int
    sources: tuple[SharedFile, ...]
    imatrix: SharedFile | None
    covariances: tuple[SharedFile, ...]
    probe: FolderProbe

    @classmethod
    def of(
        cls,
        job: PassJob,
        units: tuple[tuple[PassWork, ...], ...],
        slab: int,
        sources: tuple[SharedFile, ...],
        probe: FolderProbe,
    ) -> PassTask:
        """Raises :class:`RunnerError` if a file cannot be read."""
        fed_back = any(tensor.rounding == FEEDBACK for level in job.levels for tensor in level.tensors)
        return cls(
            # A worker's process runs in another folder.
            replace(job, donors=(), levels=tuple(_absolute(level) for level in job.levels), covariances=None),
            units,
            slab,
            sources,
            SharedFile.of(job.imatrix) if job.imatrix is not None else None,
            shared_files(covariance_files(job.covariances)) if fed_back else (),
            probe,
        )

    def open(self, node: Node) -> PassingWorker:
        sources = tuple(node.locals(self.sources))
        imatrix = node.local(self.imatrix) if self.imatrix is not None else None
        name = secrets.token_hex(8)
        in_place = node.shares and self.probe.is_here()
        scratch = None if in_place else node.scratch / f"pairs-{name}"
        job = replace(
            self.job,
            sources=sources,
            imatrix=imatrix,
            covariances=node.locals(self.covariances)[0].parent if self.covariances else None,
            threads=self.job.threads or node.threads,
            log=node.scratch / "log",
            part=PassPart(name, self.units, self.slab, ordered=True, scratch=scratch),
        )
        return PassingWorker(job, self.units, node)


class _LostPart(EngineError):
    """The library aborted the child; ``end`` says how to go on."""

    def __init__(self, end: PartEnd) -> None:
        super().__init__("The library aborted the worker", "; ".join(level.why for level in end.lost), "Read the log.")
        self.end = end


class PassingWorker:
    """A child process that knows the model and has its kernels ready, and gets one unit after another. One that the library
    aborts is followed by another, without the levels that it was lost at."""

    def __init__(self, job: PassJob, units: Sequence[Sequence[PassWork]], node: Node) -> None:
        self._units, self._node = units, node
        self._name = worker_name()
        self._lock = threading.Lock()
        self._lost: tuple[PassedLevel, ...] = ()
        self._child: OrderedChild[PassedUnit] | None = self._started(job)

    def run(self, number: int) -> PassedShare | ResultInFile:
        """Compute one unit."""
        share = PassedShare(self._name, self._computed(number))
        file = share.unit.scratch
        if file is None:
            return share
        try:
            size = file.stat().st_size
            if size > BLOCK:
                return ResultInFile(share, file, size)
            content = file.read_bytes()
            file.unlink()
        except OSError as error:
            raise from_os_error(error, "reading quantised tensors", file) from error
        return replace(share, content=content)

    def close(self) -> None:
        """End the child: it stops at its next slab."""
        with self._lock:
            child, self._child = self._child, None
        if child is not None:
            child.close()

    def _computed(self, number: int) -> PassedUnit:
        while (child := self._child) is not None:
            try:
                unit = child.run(number)
                return replace(unit, spoiled=(*unit.spoiled, *self._lost))
            except _LostPart as lost:
                with self._lock:
                    if self._child is child:  # the other thread may have been first
                        self._lost += lost.end.lost
                        self._child = self._started(lost.end.rest) if lost.end.rest and lost.end.rest.levels else None
        # Nothing is wanted of the unit any more.
        return PassedUnit(number, (), NO_FIGURES, spoiled=self._lost)

    def _started(self, job: PassJob) -> OrderedChild[PassedUnit]:
        finished = 0
        child: OrderedChild[PassedUnit]

        def on_event(event: Event) -> None:
            """Note how far the unit in work is: the child counts the elements of all units."""
            if isinstance(event, Progress) and (current := child.current) is not None:
                done = min(event.done - finished, unit_elements(self._units[current]))
                self._node.note(current, max(0.0, done))

        def serve(orders: Orders, on_unit: OnUnit[PassedUnit]) -> None:
            def on_passed(unit: PassedUnit) -> bool:
                nonlocal finished
                finished += unit_elements(self._units[unit.number])
                on_unit(unit.number, unit)
                return True

            end = self._node.engine.pass_part(job, on_event, on_passed, orders)
            if end.rest is not None:
                raise _LostPart(end)

        child = OrderedChild(serve)
        return child


class ReturnedPairs:
    """Writes what returned from workers into the outputs, and records all that they did in partial ledgers of the driver's: it
    may be a while before their own can be seen through a network file system."""

    def __init__(self, levels: Sequence[PassLevel]) -> None:
        self._folders = {level.name: level.job.out.parent for level in levels}
        self._files = {name: sorted(folder.glob("*.gguf")) for name, folder in self._folders.items()}
        self._name = f"driver-{secrets.token_hex(4)}"
        self._pending: defaultdict[str, list[LedgerEntry]] = defaultdict(list)
        self._written: set[Path] = set()
        self._recorded = time.monotonic()

    def take(self, written: Sequence[WrittenPair], blocks: Iterable[tuple[int, bytes]]) -> None:
        """Write a unit whose content comes in blocks; in none where the outputs hold it. Raises :class:`RunnerError`."""
        try:
            for place, block in blocks:
                for pair in written:
                    self._write(pair, place, memoryview(block))
        except OSError as error:
            raise from_os_error(error, "writing the levels", error.filename or Path()) from error
        for pair in written:
            for level, entry in pair.entries.items():
                self._pending[level].append(entry)
        if time.monotonic() - self._recorded > _RECORD_SECONDS:
            self.record()

    def record(self) -> None:
        """Sync what was written, then record it. Raises :class:`RunnerError`."""
        pending, self._pending = self._pending, defaultdict(list)
        try:
            for path in self._written:
                sync_file(path)
            self._written = set()
            for level, entries in pending.items():
                ledger = Ledger(part_ledger(self._folders[level], self._name), self._head(level))
                try:
                    ledger.append(entries)
                finally:
                    ledger.close()
        except OSError as error:
            raise from_os_error(error, "writing the levels", error.filename or Path()) from error
        self._recorded = time.monotonic()

    def _write(self, pair: WrittenPair, place: int, block: memoryview) -> None:
        """Write what a block that begins at ``place`` has of a pair."""
        for level, entry in pair.entries.items():
            begin, end = max(place, pair.offset), min(place + len(block), pair.offset + entry.bytes)
            if begin < end:
                path = self._files[level][entry.file]
                self._written.add(path)
                with open_to_overwrite(path) as handle:
                    handle.seek(entry.offset + begin - pair.offset)
                    rest = block[begin - place : end - place]
                    while rest:
                        rest = rest[handle.write(rest) :]

    def _head(self, level: str) -> LedgerHead:
        found = read(self._folders[level] / LEDGER_NAME)
        if found is None:
            raise EngineError(f"The ledger of {level} is gone", "another program removed it", "Run the same command again.")
        return found[0]


class SpreadPass:
    """A pass as the driver sees it: what returned, what is left, and the levels at the end."""

    def __init__(self, job: PassJob, units: Sequence[Sequence[PassWork]], sink: Sink) -> None:
        self._job, self._count, self._sink = job, len(units), sink
        self._tally, self._returned = PassTally(job.step, units), ReturnedPairs(job.levels)

    def spread(self, workers: UnitWorkers, task: PassTask) -> None:
        """Have all units done. Raises :class:`RunnerError`; what returned until then is recorded."""
        try:
            workers.spread(task, range(self._count), self._take, self._news)
        finally:
            self._returned.record()

    def finish(self, alone: OnePassAlone) -> tuple[tuple[PassedLevel, ...], PassFigures]:
        """Take in what the workers recorded and finish the levels, except those that are spoiled."""
        spoiled = self._tally.spoiled
        rest = tuple(level for level in self._job.levels if level.name not in spoiled)
        passed, figures = alone(replace(self._job, levels=rest)) if rest else ((), NO_FIGURES)
        ended = {level.name: level for level in passed} | spoiled
        levels = tuple(self._tally.level(ended[level.name], level) for level in self._job.levels)
        return levels, self._tally.figures(figures)

    def _take(self, _number: int, result: PassedShare | FetchedFile) -> bool:
        share = result.value if isinstance(result, FetchedFile) else result
        assert isinstance(share, PassedShare)
        blocks = result.blocks if isinstance(result, FetchedFile) else [(0, share.content)] if share.content is not None else []
        self._returned.take(share.unit.written, blocks)
        self._tally.add(share)
        return True

    def _news(self, partial: Mapping[int, float]) -> None:
        self._sink(self._tally.progress(partial))


class PassTally:
    """What the workers of a pass did so far. ``spoiled``: the levels that they found impossible."""

    def __init__(self, step: str, units: Sequence[Sequence[PassWork]]) -> None:
        self._step, self._sizes = step, [unit_elements(unit) for unit in units]
        self._began = time.monotonic()
        self._done = 0
        self._tensors: defaultdict[str, set[str]] = defaultdict(set)
        self._rates = WorkerRates("M", 1e6)
        self._figures: list[PassFigures] = []
        self._without_factor: set[str] = set()
        self.spoiled: dict[str, PassedLevel] = {}

    def add(self, share: PassedShare) -> None:
        """Count a unit that is done."""
        unit = share.unit
        self._done += self._sizes[unit.number]
        self._rates.add(share.worker, self._sizes[unit.number])
        for pair in unit.written:
            for level, entry in pair.entries.items():
                self._tensors[level].add(entry.tensor)
        self._figures.append(unit.figures)
        self._without_factor |= {*unit.without_factor}
        self.spoiled |= {level.name: level for level in unit.spoiled if level.name not in self.spoiled}

    def progress(self, partial: Mapping[int, float]) -> Progress:
        """``partial``: elements done of units in work."""
        done = min(self._done + sum(partial.values()), float(sum(self._sizes)))
        return Progress(self._step, done, float(sum(self._sizes)), str(self._rates))

    def level(self, passed: PassedLevel, planned: PassLevel) -> PassedLevel:
        """A level as the last pass reports it, with what workers did for it."""
        count = len(self._tensors[passed.name])
        refined = {t.name for t in planned.tensors if t.rounding == FEEDBACK and t.original in self._without_factor}
        others = tuple(name for name in (t.name for t in planned.tensors) if name in {*passed.without_feedback, *refined})
        return replace(passed, computed=passed.computed + count, kept=max(0, passed.kept - count), without_feedback=others)

    def figures(self, last: PassFigures) -> PassFigures:
        """The figures of all workers and of the last pass."""
        return replace(merged_figures([*self._figures, last]), seconds=time.monotonic() - self._began)


def unit_elements(unit: Sequence[PassWork]) -> int:
    """Return the elements that a unit quantises, once for each type."""
    return sum(work.elements * len(work.pairs) for work in unit)


def merged_figures(each: Sequence[PassFigures]) -> PassFigures:
    """Return the sum of figures; ``threads`` are those of the largest worker."""
    types: dict[str, TypeCost] = {}
    spent: defaultdict[str, float] = defaultdict(float)
    for figures in each:
        for cost in figures.types:
            old = types.get(cost.type, TypeCost(cost.type, 0, 0, 0, 0.0))
            sums = (old.pairs + cost.pairs, old.wanted + cost.wanted, old.elements + cost.elements)
            types[cost.type] = TypeCost(cost.type, *sums, round(old.seconds + cost.seconds, 4))
        seconds = sum(cost.seconds for cost in figures.types)
        for level, share in figures.shares.items():
            spent[level] += share * seconds
    total = sum(spent.values())
    return PassFigures(
        sum(figures.seconds for figures in each),
        max(figures.threads for figures in each),
        tuple(cost for _, cost in sorted(types.items())),
        sum(figures.tables for figures in each),
        sum(figures.reading for figures in each),
        sum(figures.widening for figures in each),
        sum(figures.checking for figures in each),
        sum(figures.writing for figures in each),
        {level: round(seconds / total, 4) if total else 0.0 for level, seconds in spent.items()},
    )


@contextmanager
def folder_probe(job: PassJob) -> Iterator[FolderProbe]:
    """A probe file next to the first output, removed afterwards."""
    content = secrets.token_hex(16)
    path = job.levels[0].job.out.parent.absolute() / f".cluster-probe-{content[:8]}"
    try:
        path.write_text(content, encoding="ascii")
    except OSError as error:
        raise from_os_error(error, "writing a probe file", path) from error
    try:
        yield FolderProbe(path, content)
    finally:
        with suppress(OSError):
            path.unlink()


def _absolute(level: PassLevel) -> PassLevel:
    return replace(level, job=replace(level.job, out=level.job.out.absolute()))
