"""One worker's part of a pass: units of pairs of a tensor and a type, which several workers compute in any order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from imatrix_runner.engines.files import ledger
from imatrix_runner.engines.jobs import PassedLevel, PassedUnit
from imatrix_runner.engines.pass_parts import LedgerEntry, PassPart, WrittenPair
from imatrix_runner.engines.protocol import UnitPassed
from imatrix_runner.engines.worker.quantize.output_files import LevelOutput, OutputFile
from imatrix_runner.engines.worker.quantize.pass_figures import pass_figures
from imatrix_runner.engines.worker.quantize.pass_progress import PassProgress
from imatrix_runner.engines.worker.quantize.pass_setting import PassSetting
from imatrix_runner.engines.worker.quantize.recorder import Recorder
from imatrix_runner.engines.worker.quantize.slabs import Slabs, Spent, Worker, combine, slabs_at_once
from imatrix_runner.engines.worker.quantize.work_list import Work, begun_again, plan_part
from imatrix_runner.engines.worker.stdin_stop import StdinStop


def compute_part(setting: PassSetting, part: PassPart) -> None:
    """Compute the units of a part, and send each that is done; end at a stop.

    Raises :class:`~imatrix_runner.engines.worker.refusal.Refusal`.
    """
    with ExitStack() as stack:
        outputs: dict[str, LevelOutput] = {}
        for level in setting.job.levels:
            if part.scratch is None:
                head = ledger.LedgerHead(ledger.VERSION, setting.job.lineage, level.fingerprint, part.slab)
                outputs[level.name] = LevelOutput.join(level, head, part.name)
            else:
                outputs[level.name] = LevelOutput(level, [], {}, None, 0)
            stack.callback(outputs[level.name].close)
        values = setting.values
        units = [
            plan_part(setting.source, outputs, values, setting.kernels, setting.rounder, part.slab, unit) for unit in part.units
        ]
        works = [work for unit in units for work in unit]
        _Part(setting, part, list(outputs.values()), units, setting.prepare(works)).run(works)


@dataclass
class _OpenUnit:
    """A unit in work. ``left`` of its works are not done."""

    number: int
    works: list[Work]
    scratch: OutputFile | None
    left: int
    written: list[WrittenPair] = field(default_factory=list)


class _Part:
    """Threads take slabs across units: none waits at a unit's end."""

    def __init__(
        self,
        setting: PassSetting,
        part: PassPart,
        outputs: Sequence[LevelOutput],
        units: Sequence[Sequence[Work]],
        tables: float,
    ) -> None:
        self._setting, self._part, self._outputs, self._units, self._tables = setting, part, outputs, units, tables
        self._stop = StdinStop()
        self._recorder = Recorder(self._stop.end)
        self._failed = threading.Event()
        stopped = lambda: self._stop.requested or self._failed.is_set() or self._recorder.failed  # noqa: E731
        self._slabs = Slabs(self._ordered(), stopped, slabs_at_once(setting.threads))
        self._lock = threading.Lock()
        self._open: dict[int, _OpenUnit] = {}
        total = float(sum(work.cost for works in units for work in works))
        self._progress = PassProgress(setting.send, setting.job.step, total, sum(map(len, units)))
        self._spent = [Spent() for _ in range(setting.threads)]
        self._reported, self._since = Spent(), time.monotonic()

    def run(self, works: Sequence[Work]) -> None:
        """``works``: those of all units."""
        try:
            self._setting.serve(works, self._spent, self._serve)
        finally:
            self._recorder.finish()
            for unit in self._open.values():  # left by a stop
                self._drop(unit)

    def _ordered(self) -> Iterator[Work]:
        """The works of each unit as it is ordered; waits for orders."""
        numbers = range(len(self._units))
        for number in self._stop.units(numbers, ordered=self._part.ordered):
            scratch = self._scratch(number)
            works: list[Work] = []
            offset = 0
            for planned in self._units[number]:
                works.append(begun_again(planned, scratch, offset))
                offset += sum(part.targets[0][1].n_bytes for part in planned.parts)
            unit = _OpenUnit(number, works, scratch, len(works))
            if not works:
                self._recorder.afterwards(partial(self._report, unit))
            with self._lock:
                self._open.update((id(work), unit) for work in works)
            yield from works

    def _scratch(self, number: int) -> OutputFile | None:
        if self._part.scratch is None:
            return None
        self._part.scratch.mkdir(parents=True, exist_ok=True)
        return OutputFile(self._part.scratch / f"{self._part.name}-{number}.tensors", None, fresh=True)

    def _serve(self, worker: Worker) -> None:
        try:
            while (taken := self._slabs.take()) is not None:
                work, slabs = taken
                for first in slabs:
                    worker.process(work, first)
                self._progress.slabs(work, len(slabs))
                if work.slabs_done(len(slabs)):
                    self._finish(work)
        except BaseException:
            self._failed.set()
            self._stop.end()  # a thread may be waiting for an order
            raise

    def _finish(self, work: Work) -> None:
        written: list[WrittenPair] = []
        for part in work.parts:
            if not (alive := part.alive):
                continue
            crc = combine(part.crcs)
            entries: dict[str, LedgerEntry] = {}
            for output, place in alive:
                entry = LedgerEntry(work.name, part.kind.name, part.key, place.file, place.offset, place.n_bytes, crc)
                entries[output.level.name] = entry
                if part.scratch is None:
                    self._recorder.add(output, entry)
            written.append(WrittenPair(entries, part.scratch.offset if part.scratch is not None else 0))
        with self._lock:
            unit = self._open.pop(id(work))
            unit.written += written
            unit.left -= 1
            done = unit.left == 0
        if done:
            self._recorder.afterwards(partial(self._report, unit))

    def _report(self, unit: _OpenUnit) -> None:
        setting = self._setting
        if unit.scratch is not None:
            unit.scratch.close()
        spent = Spent.total(self._spent, self._reported)
        self._reported = Spent.total([self._reported, spent])
        now = time.monotonic()
        figures = pass_figures(now - self._since, setting.threads, self._tables, spent, unit.works)
        self._since, self._tables = now, 0.0
        spoiled = [(output.level.name, *output.spoiled) for output in self._outputs if output.spoiled is not None]
        done = PassedUnit(
            unit.number,
            tuple(unit.written),
            figures,
            unit.scratch.path if unit.scratch is not None else None,
            tuple(PassedLevel(*why) for why in spoiled),
            tuple(setting.rounder.without_factor),
        )
        setting.send(UnitPassed(done))

    def _drop(self, unit: _OpenUnit) -> None:
        if unit.scratch is not None:
            unit.scratch.close()
            with suppress(OSError):
                unit.scratch.path.unlink()
