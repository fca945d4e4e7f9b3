"""The worker's pass: many levels from one reading of the model, every byte as llama-quantize writes it."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from imatrix_runner.engines.base import PassedLevel, PassFigures, PassLevel, TypeCost
from imatrix_runner.engines.embedded import ledger, quantizing
from imatrix_runner.engines.embedded.fast import Fast
from imatrix_runner.engines.embedded.headers import Head, HeaderMaker, Source
from imatrix_runner.engines.embedded.kernels import Kernels
from imatrix_runner.engines.embedded.levels import find_type, ftypes_of, guessed_ftype, quant_types
from imatrix_runner.engines.embedded.library import Library, load
from imatrix_runner.engines.embedded.outputs import Output
from imatrix_runner.engines.embedded.overrides import NotAccepted, imatrix_overrides, parse_override
from imatrix_runner.engines.embedded.protocol import Answer, Pass, Passed
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.engines.embedded.session import usable_cpus
from imatrix_runner.engines.embedded.slabs import SLAB, Doing, Slabs, Spent, Worker, combine
from imatrix_runner.engines.embedded.stdin import Stop
from imatrix_runner.engines.embedded.weights import Values, Weights
from imatrix_runner.engines.embedded.workload import Copies, Work, plan_work
from imatrix_runner.errors import EngineError, RunnerError, from_os_error
from imatrix_runner.events import Progress

_SYNC_SECONDS = 1.0
_TELL_SECONDS = 0.2


def single_pass(request: Pass, tell: Callable[[Answer], None]) -> None:
    """Make every level of the request; tell each that is whole, or what spoiled it, then the figures.

    Raises :class:`Refusal`.
    """
    try:
        with ExitStack() as stack:
            _Pass.of(request, tell, stack).run()
    except NotAccepted as refused:
        quantizing.say(f"{refused}\n")  # the parent explains it as it does llama-quantize's own words
        raise Refusal.failed("llama.cpp does not accept an option", str(refused)) from refused
    except RunnerError as error:
        raise Refusal(error.what, error.why, error.todo, error.exit_code) from error
    except OSError as error:
        told = from_os_error(error, "writing the levels", error.filename or request.levels[0].job.out.parent)
        raise Refusal(told.what, told.why, told.todo, told.exit_code) from error


@dataclass
class _Pass:
    request: Pass
    source: Source
    outputs: list[Output]
    works: list[Work]
    kernels: Kernels
    weights: Weights | None
    threads: int
    tell: Callable[[Answer], None]
    stop: Stop
    doing: Doing = field(default_factory=dict)

    @classmethod
    def of(cls, request: Pass, tell: Callable[[Answer], None], stack: ExitStack) -> _Pass:
        # ggml makes its tables with OpenMP, whose threads would otherwise spin against each other on a busy machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        library = load()
        kernels = Kernels(library)
        source = Source.open(request.sources, kernels)
        weights = quantizing.chosen_weights(request.imatrix, request.levels[0].job.options)
        threads = max(1, request.threads or usable_cpus())
        slab = _slab(request.buffer_bytes, threads)
        maker = HeaderMaker(library, kernels, source)
        outputs: list[Output] = []
        for level in request.levels:
            layouts, places = maker.make(_head(library, level, source, weights), level.tensors)
            head = ledger.Head(ledger.VERSION, request.lineage, level.fingerprint, slab)
            try:
                output = Output.open(level, layouts, places, head)
            except OSError:
                for opened in outputs:
                    opened.give_up()
                raise
            stack.callback(output.close)
            outputs.append(output)
        copies = Copies(request.lineage, slab)
        for donor in request.donors:
            copies.add_donor(donor)
        for output in outputs:
            copies.add_output(output)
        values: Mapping[bytes, Values] = weights.values if weights is not None else {}
        works = plan_work(source, outputs, values, copies, kernels, slab)
        job = cls(request, source, outputs, works, kernels, weights, threads, tell, Stop())
        quantizing.on_abort(library, job.aborting)
        return job

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
            self.tell(Passed(self._result(output)))
        seconds = time.monotonic() - began
        # Only now: what was to be copied and could not be was computed.
        self.tell(Passed(None, _figures(seconds, self.threads, tables, spent, self.works)))

    def aborting(self, message: bytes) -> None:
        """An assertion of ggml failed, and the process ends when this returns: say which levels it concerns. The others go on
        in another worker, from their ledgers."""
        quantizing.write(message + b"\n")
        doing = self.doing.get(threading.get_ident())
        if doing is None:
            return
        work, part = doing
        why = f"ggml gave up on it as {part.kind.name}: {message.decode('utf-8', 'replace').strip().rpartition(': ')[2]}"
        for output, _ in part.alive:
            self.tell(Passed(PassedLevel(output.level.name, work.name, why)))
        os._exit(EngineError.exit_code)

    def _over(self) -> bool:
        return self.stop.requested or all(output.spoiled is not None for output in self.outputs)

    def _prepare(self) -> float:
        """Our own kernels where they are proven, and ggml's tables of the IQ types for the others; in seconds."""
        began = time.monotonic()
        wanted = {(part.kind, part.weighted) for work in self.works for part in work.parts if work.computes(part)}
        fast = Fast(self.request.native, self.kernels) if self.request.native is not None else None
        for kind, weighted in sorted(wanted, key=lambda pair: pair[0].number):
            if fast is None or not fast.install(kind, weighted=weighted):
                self.kernels.prepare(kind)
        return time.monotonic() - began

    def _result(self, output: Output) -> PassedLevel:
        tensor, why = output.spoiled or ("", "")
        known = self.weights.values.keys() if self.weights is not None else None
        without = tuple(
            target.name
            for target in output.level.tensors
            if known is not None
            and target.original.encode() not in known
            and self.source.tensors[target.original].kind != output.places[target.name].kind
        )
        return PassedLevel(output.level.name, tensor, why, output.computed, output.copied, output.kept, without)


class _Round:
    """Every slab of some works through the threads; what was copied but does not have its checksum is to be done again."""

    def __init__(self, job: _Pass, works: Sequence[Work], recorder: _Recorder) -> None:
        self._job, self._works, self._recorder = job, works, recorder
        self._slabs = Slabs(works, lambda: job._over() or bool(self._errors) or recorder.failed)
        self._errors: list[BaseException] = []
        self._again: list[Work] = []
        self._progress = _Progress(job, works)

    def run(self, spent: Spent) -> list[Work]:
        workers = [Worker(self._job.source, self._works, self._job.kernels, self._job.doing) for _ in range(self._job.threads)]
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
        """All slabs of a tensor are written."""
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
                entry = ledger.Entry(work.name, part.kind.name, part.key, place.file, place.offset, place.n_bytes, crc)
                self._recorder.add(output, entry)
        if wrong:
            self._again.append(Work(work.name, work.tensor, wrong, work.rows, work.read_weights))


class _Recorder:
    """Forces what is written to the disk now and then, and only then records it; in a thread of its own, because it waits."""

    def __init__(self, job: _Pass) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._waiting: dict[Output, list[ledger.Entry]] = {}
        self._end = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, output: Output, entry: ledger.Entry) -> None:
        with self._lock:
            self._waiting.setdefault(output, []).append(entry)

    @property
    def failed(self) -> bool:
        """Whether the disk refused: then nothing more is recorded, and to compute more would be lost work."""
        return self._error is not None

    def finish(self) -> None:
        """Everything is recorded. Raises what went wrong on the way."""
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
    """Elements quantised, times types; told now and then."""

    def __init__(self, job: _Pass, works: Sequence[Work]) -> None:
        self._job = job
        self._costs = {id(work): work.cost / max(1, len(work.slabs)) for work in works}
        self._numbers = {id(work): number for number, work in enumerate(works, 1)}
        self._done, self._total = 0.0, float(sum(work.cost for work in works))
        self._lock = threading.Lock()
        self._told = 0.0

    def slab(self, work: Work) -> None:
        with self._lock:
            self._done += self._costs[id(work)]
            now = time.monotonic()
            if now - self._told < _TELL_SECONDS:
                return
            self._told = now
            note = f"{self._numbers[id(work)]}/{len(self._numbers)} {work.name}"
            self._job.tell(Progress(self._job.request.step, self._done, self._total, note))


def _slab(buffer_bytes: int, threads: int) -> int:
    """Elements of a slab; fewer than :data:`SLAB` only where the bound on memory asks for it (12 bytes an element: as it is,
    as float32, and quantised)."""
    return min(SLAB, max(1, buffer_bytes // (12 * threads)))


def _head(library: Library, level: PassLevel, source: Source, weights: Weights | None) -> Head:
    job = level.job
    kind = find_type(quant_types(ftypes_of(vars(library.llama))), job.ftype)
    if kind is None:
        raise NotAccepted(f"llama_quantize: invalid ftype '{job.ftype}'")
    number = _own_file_type(library, source) if kind.number is None else kind.number
    overrides = [parse_override(text) for text in job.options.override_kv]
    if weights is not None and job.imatrix is not None:
        overrides += imatrix_overrides(job.imatrix.name, weights)
    return Head(number, tuple(overrides), bool(job.options.prune_layers), job.options.keep_split)


def _own_file_type(library: Library, source: Source) -> int:
    """What COPY writes."""
    told = source.header.integer("general.file_type")
    types = {name: tensor.kind.name for name, tensor in source.tensors.items()}
    return guessed_ftype(types, ftypes_of(vars(library.llama))) if told is None else told


def _pairs(works: Sequence[Work]) -> dict[str, tuple[int, int, int]]:
    """Type -> pairs to compute, outputs that want them, elements."""
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
    """Level -> its part of the time that went into types, 0 to 1."""
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
