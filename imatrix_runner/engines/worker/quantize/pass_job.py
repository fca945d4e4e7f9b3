"""Pass job: many levels from one reading of the model, byte for byte as llama-quantize writes them."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from imatrix_runner.engines.files.imatrix_weights import ImatrixValues, Values
from imatrix_runner.engines.ftypes import find_type, ftypes_of, guessed_ftype, quant_types
from imatrix_runner.engines.jobs import PassedLevel, PassFigures, PassJob, PassLevel, TypeCost
from imatrix_runner.engines.protocol import Passed, Send
from imatrix_runner.engines.roundings import FEEDBACK
from imatrix_runner.engines.worker.library import Library, load
from imatrix_runner.engines.worker.llama_context import usable_cpus
from imatrix_runner.engines.worker.quantize import ledger, llama_quantize
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels
from imatrix_runner.engines.worker.quantize.gguf_headers import GgufHead, HeaderMaker, SourceHeader
from imatrix_runner.engines.worker.quantize.native_kernels import prepare
from imatrix_runner.engines.worker.quantize.output_files import LevelOutput, allow_open_files
from imatrix_runner.engines.worker.quantize.overrides import NotAccepted, imatrix_overrides, parse_override
from imatrix_runner.engines.worker.quantize.rounding.row_rounder import RowRounder
from imatrix_runner.engines.worker.quantize.slabs import SLAB, Doing, Slabs, Spent, Worker, combine
from imatrix_runner.engines.worker.quantize.work_list import Copies, Work, plan_work
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.errors import EngineError, RunnerError, from_os_error
from imatrix_runner.events import Progress

_SYNC_SECONDS = 1.0
_PROGRESS_SECONDS = 0.2


def single_pass(job: PassJob, send: Send) -> None:
    """Make every level of the job. Sends the result of each level, complete or spoiled, then the figures.

    Raises :class:`Refusal`.
    """
    try:
        with ExitStack() as stack:
            _Pass.of(job, send, stack).run()
    except NotAccepted as refused:
        llama_quantize.say(f"{refused}\n")  # the parent explains it like llama-quantize's own message
        raise Refusal.failed("llama.cpp does not accept an option", str(refused)) from refused
    except RunnerError as error:
        raise Refusal(error.what, error.why, error.todo, error.exit_code) from error
    except OSError as error:
        failure = from_os_error(error, "writing the levels", error.filename or job.levels[0].job.out.parent)
        raise Refusal(failure.what, failure.why, failure.todo, failure.exit_code) from error


@dataclass
class _Pass:
    """``weights``: by level, what its options leave of the imatrix."""

    job: PassJob
    source: SourceHeader
    outputs: list[LevelOutput]
    works: list[Work]
    kernels: Kernels
    rounder: RowRounder
    weights: Mapping[str, ImatrixValues | None]
    threads: int
    send: Send
    stop: StdinStop
    doing: Doing = field(default_factory=dict)

    @classmethod
    def of(cls, job: PassJob, send: Send, stack: ExitStack) -> _Pass:
        allow_open_files()  # each thread reads shards of the source and of donors, and every shard of every level is open
        # ggml builds its tables with OpenMP, whose threads would otherwise spin against each other on a busy machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        library = load()
        kernels = Kernels(library)
        source = SourceHeader.open(job.sources, kernels)
        weights = {level.name: llama_quantize.chosen_weights(job.imatrix, level.job.options) for level in job.levels}
        threads = max(1, job.threads or usable_cpus())
        slab = _slab(job.buffer_bytes, threads)
        maker = HeaderMaker(library, kernels, source)
        outputs: list[LevelOutput] = []
        for level in job.levels:
            layouts, places = maker.make(_head(library, level, source, weights[level.name]), level.tensors)
            head = ledger.LedgerHead(ledger.VERSION, job.lineage, level.fingerprint, slab)
            try:
                output = LevelOutput.open(level, layouts, places, head)
            except OSError:
                for opened in outputs:
                    opened.give_up()
                raise
            stack.callback(output.close)
            outputs.append(output)
        copies = Copies(job.lineage, slab)
        for donor in job.donors:
            copies.add_donor(donor)
        for output in outputs:
            copies.add_output(output)
        values: dict[str, Mapping[bytes, Values]] = {
            name: chosen.values if chosen is not None else {} for name, chosen in weights.items()
        }
        rounder = RowRounder(kernels, job.native, job.covariances, threads)
        works = plan_work(source, outputs, values, copies, kernels, rounder, slab)
        made = cls(job, source, outputs, works, kernels, rounder, weights, threads, send, StdinStop())
        llama_quantize.on_abort(library, made.aborting)
        return made

    def run(self) -> None:
        began = time.monotonic()
        tables = self._prepare()
        recorder = _Recorder(self)
        works = self.works
        spent = Spent()
        while works and not self._over():
            again = _Round(self, works, recorder).run(spent)
            works = again
        recorder.finish()
        if self.stop.requested:
            return
        for output in self.outputs:
            if output.spoiled is None:
                output.finish()
            self.send(Passed(self._result(output)))
        seconds = time.monotonic() - began
        # Sent last, because tensors that could not be copied were computed as well.
        self.send(Passed(None, _figures(seconds, self.threads, tables, spent, self.works)))

    def aborting(self, message: bytes) -> None:
        """Handle a failed assertion of ggml, after which the process must end: send which levels it spoils. The others continue
        in another worker, from their ledgers."""
        llama_quantize.write(message + b"\n")
        doing = self.doing.get(threading.get_ident())
        if doing is None:
            return
        work, part = doing
        reason = message.decode("utf-8", "replace").strip().rpartition(": ")[2]
        why = f"ggml aborted while quantising it to {part.kind.name}: {reason}"
        for output, _ in part.alive:
            self.send(Passed(PassedLevel(output.level.name, work.name, why)))
        os._exit(EngineError.exit_code)

    def _over(self) -> bool:
        return self.stop.requested or all(output.spoiled is not None for output in self.outputs)

    def _prepare(self) -> float:
        """Make the kernels ready for the types that are computed; returns the seconds."""
        parts = [part for work in self.works for part in work.parts if work.computes(part)]
        seconds = prepare(self.kernels, self.job.native, {(part.kind, part.weighted) for part in parts})
        began = time.monotonic()
        self.rounder.prepare({(part.kind, part.rounding) for part in parts})
        return seconds + time.monotonic() - began

    def _result(self, output: LevelOutput) -> PassedLevel:
        tensor, why = output.spoiled or ("", "")
        weights = self.weights[output.level.name]
        known = weights.values.keys() if weights is not None else None
        without = tuple(
            target.name
            for target in output.level.tensors
            if known is not None
            and target.original.encode() not in known
            and self.source.tensors[target.original].kind != output.places[target.name].kind
        )
        failed = self.rounder.without_factor
        refined = tuple(t.name for t in output.level.tensors if t.rounding == FEEDBACK and t.original in failed)
        counts = (output.computed, output.copied, output.kept)
        return PassedLevel(output.level.name, tensor, why, *counts, without, refined)


class _Round:
    """Processes every slab of some works in threads; a tensor that was copied with a wrong checksum has to be done again."""

    def __init__(self, whole: _Pass, works: Sequence[Work], recorder: _Recorder) -> None:
        self._whole, self._works, self._recorder = whole, works, recorder
        self._slabs = Slabs(works, lambda: whole._over() or bool(self._errors) or recorder.failed)
        self._errors: list[BaseException] = []
        self._again: list[Work] = []
        self._progress = _Progress(whole, works)

    def run(self, spent: Spent) -> list[Work]:
        whole = self._whole
        workers = [Worker(whole.source, self._works, whole.kernels, whole.rounder, whole.doing) for _ in range(whole.threads)]
        threads = [threading.Thread(target=self._serve, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for worker in workers:
            spent.add(worker.spent)
        if self._errors:
            self._recorder.finish()
            raise self._errors[0]
        return self._again

    def _serve(self, worker: Worker) -> None:
        try:
            while (taken := self._slabs.take()) is not None:
                work, first = taken
                worker.process(work, first)
                self._progress.slab(work)
                if work.slab_done():
                    self._finish(work)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._errors.append(error)
        finally:
            worker.close()

    def _finish(self, work: Work) -> None:
        """Record a tensor after all its slabs are written, or schedule it again if a copy's checksum is wrong."""
        wrong = []
        for part in work.parts:
            crc = combine(part.crcs)
            if part.copies and crc != part.copies[0].crc:
                part.copies.pop(0)
                part.crcs.clear()
                wrong.append(part)
                continue
            for output, place in part.alive:
                if part.copies:
                    output.copied += 1
                elif work.computes(part):
                    output.computed += 1
                entry = ledger.LedgerEntry(work.name, part.kind.name, part.key, place.file, place.offset, place.n_bytes, crc)
                self._recorder.add(output, entry)
        if wrong:
            self._again.append(Work(work.name, work.tensor, wrong, work.rows, work.read_weights))


class _Recorder:
    """Syncs written tensors to disk from time to time, then records them; in its own thread, because syncing blocks."""

    def __init__(self, whole: _Pass) -> None:
        self._whole = whole
        self._lock = threading.Lock()
        self._waiting: dict[LevelOutput, list[ledger.LedgerEntry]] = {}
        self._end = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, output: LevelOutput, entry: ledger.LedgerEntry) -> None:
        with self._lock:
            self._waiting.setdefault(output, []).append(entry)

    @property
    def failed(self) -> bool:
        """Whether a write failed: nothing more is recorded, so further computation would be lost."""
        return self._error is not None

    def finish(self) -> None:
        """Record everything that is left. Raises the error of a failed write."""
        self._end.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        last, pause = False, _SYNC_SECONDS
        while not last:
            last = self._end.wait(pause)
            began = time.monotonic()
            with self._lock:
                waiting, self._waiting = self._waiting, {}
            try:
                for output, entries in waiting.items():
                    output.record(entries)
            except OSError as error:
                self._error = error
                return
            pause = max(_SYNC_SECONDS, 20 * (time.monotonic() - began))  # writers wait while a file is synced


class _Progress:
    """Sends progress at intervals: elements quantised, once for each type."""

    def __init__(self, whole: _Pass, works: Sequence[Work]) -> None:
        self._whole = whole
        self._costs = {id(work): work.cost / max(1, len(work.slabs)) for work in works}
        self._numbers = {id(work): number for number, work in enumerate(works, 1)}
        self._done, self._total = 0.0, float(sum(work.cost for work in works))
        self._lock = threading.Lock()
        self._reported = 0.0

    def slab(self, work: Work) -> None:
        with self._lock:
            self._done += self._costs[id(work)]
            now = time.monotonic()
            if now - self._reported < _PROGRESS_SECONDS:
                return
            self._reported = now
            note = f"{self._numbers[id(work)]}/{len(self._numbers)} {work.name}"
            self._whole.send(Progress(self._whole.job.step, self._done, self._total, note))


def _slab(buffer_bytes: int, threads: int) -> int:
    """Elements of a slab; fewer than :data:`SLAB` only if the bound on memory requires it (12 bytes per element: source,
    float32 and quantised data)."""
    return min(SLAB, max(1, buffer_bytes // (12 * threads)))


def _head(library: Library, level: PassLevel, source: SourceHeader, weights: ImatrixValues | None) -> GgufHead:
    job = level.job
    kind = find_type(quant_types(ftypes_of(vars(library.llama))), job.ftype)
    if kind is None:
        raise NotAccepted(f"llama_quantize: invalid ftype '{job.ftype}'")
    number = _own_file_type(library, source) if kind.number is None else kind.number
    overrides = [parse_override(text) for text in job.options.override_kv]
    if weights is not None and job.imatrix is not None:
        overrides += imatrix_overrides(job.imatrix.name, weights)
    return GgufHead(number, tuple(overrides), bool(job.options.prune_layers), job.options.keep_split, job.shards)


def _own_file_type(library: Library, source: SourceHeader) -> int:
    """The file type that COPY writes."""
    declared = source.header.integer("general.file_type")
    types = {name: tensor.kind.name for name, tensor in source.tensors.items()}
    return guessed_ftype(types, ftypes_of(vars(library.llama))) if declared is None else declared


def _pairs(works: Sequence[Work]) -> dict[str, tuple[int, int, int]]:
    """Type -> number of pairs to compute, of outputs that want them, and of elements."""
    pairs: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for work in works:
        for part in work.parts:
            if work.computes(part):
                pairs[part.kind.name] += 1
                wanted[part.kind.name] += len(part.targets)
                elements[part.kind.name] += work.tensor.n_elements
    return {name: (pairs[name], wanted[name], elements[name]) for name in pairs}


def _shares(works: Sequence[Work], types: Sequence[TypeCost]) -> dict[str, float]:
    """Level -> its share of the time spent on types, 0 to 1."""
    total = sum(cost.seconds for cost in types)
    each = {cost.type: cost.seconds / cost.elements for cost in types if cost.elements}
    spent: dict[str, float] = {}
    for work in works:
        for part in work.parts:
            seconds = each.get(part.kind.name, 0.0) * work.tensor.n_elements if work.computes(part) else 0.0
            for output, _ in part.targets:
                spent[output.level.name] = spent.get(output.level.name, 0.0) + seconds / len(part.targets)
    return {name: round(seconds / total, 4) if total else 0.0 for name, seconds in spent.items()}


def _figures(seconds: float, threads: int, tables: float, spent: Spent, works: Sequence[Work]) -> PassFigures:
    pairs = _pairs(works)
    types = tuple(TypeCost(name, *figures, round(spent.types[name], 4)) for name, figures in sorted(pairs.items()))
    return PassFigures(
        seconds, threads, types, tables, spent.reading, spent.widening, spent.checking, spent.writing, _shares(works, types)
    )
