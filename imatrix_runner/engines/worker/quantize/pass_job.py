"""Pass job: many levels from one reading of the model, byte for byte as llama-quantize writes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from imatrix_runner.engines.files import ledger
from imatrix_runner.engines.files.imatrix_weights import ImatrixValues
from imatrix_runner.engines.ftypes import find_type, ftypes_of, guessed_ftype, quant_types
from imatrix_runner.engines.jobs import PassedLevel, PassJob, PassLevel
from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.engines.protocol import Passed, Prepared, PreparePassJob, Send
from imatrix_runner.engines.roundings import FEEDBACK
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.quantize import llama_quantize
from imatrix_runner.engines.worker.quantize.gguf_headers import GgufHead, HeaderMaker, SourceHeader
from imatrix_runner.engines.worker.quantize.output_files import LevelOutput
from imatrix_runner.engines.worker.quantize.overrides import NotAccepted, imatrix_overrides, parse_override
from imatrix_runner.engines.worker.quantize.part_job import compute_part
from imatrix_runner.engines.worker.quantize.pass_figures import pass_figures
from imatrix_runner.engines.worker.quantize.pass_progress import PassProgress
from imatrix_runner.engines.worker.quantize.pass_setting import PassSetting
from imatrix_runner.engines.worker.quantize.recorder import Recorder
from imatrix_runner.engines.worker.quantize.slabs import Slabs, Spent, Worker, combine, slabs_at_once
from imatrix_runner.engines.worker.quantize.work_list import Copies, Work, left_works, plan_work
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.errors import RunnerError, from_os_error

_WORKS = 100
"""Tensors in one message; with many levels each takes tens of kilobytes."""


def single_pass(job: PassJob, send: Send) -> None:
    """Make every level of the job. Sends the result of each level, complete or spoiled, then the figures. Of a job with a part
    compute that, and send what is done.

    Raises :class:`Refusal`.
    """
    with _explained(job), ExitStack() as stack:
        setting = PassSetting.of(job, send)
        if job.part is not None:
            compute_part(setting, job.part)
        else:
            _Pass.of(setting, stack).run()


def prepare_pass(job: PreparePassJob, send: Send) -> None:
    """Create the outputs of a pass with their ledgers, or continue them, and send what is left to compute.

    Raises :class:`Refusal`.
    """
    with _explained(job.job), ExitStack() as stack:
        setting = PassSetting.of(job.job, send)
        whole = _Pass.of(setting, stack)
        works = left_works(whole.works)
        for first in range(0, len(works), _WORKS):
            send(Prepared(works[first : first + _WORKS]))
        send(Prepared((), setting.slab))


@contextmanager
def _explained(job: PassJob) -> Iterator[None]:
    try:
        yield
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
    setting: PassSetting
    outputs: list[LevelOutput]
    works: list[Work]
    stop: StdinStop = field(default_factory=StdinStop)

    @classmethod
    def of(cls, setting: PassSetting, stack: ExitStack) -> _Pass:
        job, source, slab = setting.job, setting.source, setting.slab
        maker = HeaderMaker(setting.library, setting.kernels, source)
        outputs: list[LevelOutput] = []
        for level in job.levels:
            layouts, places = maker.make(_head(setting.library, level, source, setting.weights[level.name]), level.tensors)
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
        works = plan_work(source, outputs, setting.values, copies, setting.kernels, setting.rounder, slab)
        return cls(setting, outputs, works)

    def run(self) -> None:
        began = time.monotonic()
        tables = self.setting.prepare(self.works)
        recorder = Recorder()
        works = self.works
        spent = [Spent() for _ in range(self.setting.threads)]
        while works and not self.over():
            works = _Round(self, works, recorder).run(spent)
        recorder.finish()
        if self.stop.requested:
            return
        for output in self.outputs:
            if output.spoiled is None:
                output.finish()
            self.setting.send(Passed(self._result(output)))
        seconds = time.monotonic() - began
        # Sent last, because tensors that could not be copied were computed as well.
        self.setting.send(Passed(None, pass_figures(seconds, self.setting.threads, tables, Spent.total(spent), self.works)))

    def over(self) -> bool:
        return self.stop.requested or all(output.spoiled is not None for output in self.outputs)

    def _result(self, output: LevelOutput) -> PassedLevel:
        setting = self.setting
        tensor, why = output.spoiled or ("", "")
        weights = setting.weights[output.level.name]
        known = weights.values.keys() if weights is not None else None
        without = tuple(
            target.name
            for target in output.level.tensors
            if known is not None
            and target.original.encode() not in known
            and setting.source.tensors[target.original].kind != output.places[target.name].kind
        )
        failed = setting.rounder.without_factor
        refined = tuple(t.name for t in output.level.tensors if t.rounding == FEEDBACK and t.original in failed)
        counts = (output.computed, output.copied, output.kept)
        return PassedLevel(output.level.name, tensor, why, *counts, without, refined)


class _Round:
    """Processes every slab of some works in threads; a tensor that was copied with a wrong checksum has to be done again."""

    def __init__(self, whole: _Pass, works: Sequence[Work], recorder: Recorder) -> None:
        self._setting, self._works, self._recorder = whole.setting, works, recorder
        self._failed = threading.Event()
        stopped = lambda: whole.over() or self._failed.is_set() or recorder.failed  # noqa: E731
        self._slabs = Slabs(works, stopped, slabs_at_once(whole.setting.threads))
        self._again: list[Work] = []
        total = float(sum(work.cost for work in works))
        self._progress = PassProgress(whole.setting.send, whole.setting.job.step, total, len(works))

    def run(self, spent: Sequence[Spent]) -> list[Work]:
        try:
            self._setting.serve(self._works, spent, self._serve)
        except BaseException:
            self._recorder.finish()
            raise
        return self._again

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
            raise

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
                entry = LedgerEntry(work.name, part.kind.name, part.key, place.file, place.offset, place.n_bytes, crc)
                self._recorder.add(output, entry)
        if wrong:
            self._again.append(Work(work.name, work.tensor, wrong, work.rows, work.read_weights))


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
