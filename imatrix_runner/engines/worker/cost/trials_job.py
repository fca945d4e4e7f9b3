"""Trials job: how far the predictions of a loaded model move when some of its weights are rounded, in memory.

Each trial overwrites weights with rounded numbers, computes chunks, and puts the model's own bytes back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from imatrix_runner.engines.cost_jobs import Trial, TrialResult, TrialsJob
from imatrix_runner.engines.files.cost_files import CostFile, reference_of
from imatrix_runner.engines.protocol import Costed, Send, TrialMeasured
from imatrix_runner.engines.worker.abi_check import check
from imatrix_runner.engines.worker.batching import batches
from imatrix_runner.engines.worker.cost.loaded_weights import LoadedWeights, not_writable
from imatrix_runner.engines.worker.cost.reference_scores import ReferenceScores, Sums, checksum, is_enough
from imatrix_runner.engines.worker.cost.rounding import (
    Doing,
    Rounder,
    Rounders,
    Slab,
    Source,
    open_rounders,
    refusing,
    report_aborts,
)
from imatrix_runner.engines.worker.evaluate.chunk_logits import ChunkLogits
from imatrix_runner.engines.worker.evaluate.logit_math import F32
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.llama_context import open_context, open_weights, usable_cpus
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.engines.worker.tokens import Tokens, tokenize
from imatrix_runner.events import Progress
from imatrix_runner.models.gguf_names import shard_names


def measure_trials(job: TrialsJob, send: Send) -> None:
    """Write the result of every trial that is not in the file yet, in the job's order; at a stop those that are complete.

    Of an ordered job send the results, and write none.
    """
    scratch = reference_of(job.out)
    if job.ordered:
        with refusing("measuring trials", job.out), _open(job, job.trials, scratch, send) as trials:
            send(Costed(trials.serve(send)))
        return
    with refusing("measuring trials", job.out), closing(CostFile(job.out, job.fingerprint, TrialResult)) as file:
        scratch.unlink(missing_ok=True)  # a killed job's
        known = {result.trial for result in file.records}
        todo = [trial for trial in job.trials if trial.name not in known]
        if not todo:
            send(Costed(done=True))
            return
        with _open(job, todo, scratch, send) as trials:
            send(Costed(trials.run(todo, file)))


@contextmanager
def _open(job: TrialsJob, todo: Sequence[Trial], scratch: Path, send: Send) -> Iterator[_Trials]:
    """Load the model, and find the weights that ``todo`` rounds."""
    library, stop = load(), StdinStop()
    check(library)
    doing: Doing = {}
    report_aborts(library, doing, send)
    # Mapped weights are read-only, and repacked ones have another layout.
    options = replace(job.options, mmap=False, repack=False)
    threads = max(1, options.threads or usable_cpus())
    source = Source.open(library, [job.model.with_name(name) for name in shard_names(job.model)], job)
    wanted = [tensor for trial in todo for tensor in trial.tensors]
    source.check(wanted, in_place=True)
    source.prepare(job, wanted)
    names = {tensor.name for tensor in wanted}
    with ExitStack() as stack:
        model = stack.enter_context(open_weights(library, job.model, options))
        weights = LoadedWeights.find(library, model, source.header, options, names)
        context = stack.enter_context(open_context(library, model, job.model, options, None))
        tokens = tokenize(library, context.vocab, job.text, parse_special=options.parse_special)
        chunks = _chosen_chunks(job, tokens)
        rounders = stack.enter_context(open_rounders(source, names, threads, doing))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        logits = ChunkLogits(context, pool, options, stop, job.model, job.chunks, job.first_scored)
        logits.refuse_bad_tensors()
        shape = (len(chunks), options.n_ctx - 1 - job.first_scored, context.n_vocab)
        reference = stack.enter_context(closing(ReferenceScores(scratch, *shape)))
        each = len(list(batches(0, len(chunks), options)))
        progress = _Progress(job, send, each, each * (len(job.trials) - len(todo)))
        yield _Trials(job, source, weights, rounders, logits, chunks, reference, progress)


def _chosen_chunks(job: TrialsJob, tokens: Tokens) -> Tokens:
    """int32 [n, n_ctx]: the job's chunks."""
    n_ctx, last = job.options.n_ctx, max(job.chunks) + 1
    if len(tokens) < last * n_ctx:
        raise Refusal.invalid(
            f"The text has {len(tokens)} tokens, too few for {last} chunks of {n_ctx}",
            "it is shorter now than when its tokens were counted",
            "Run the same command again.",
        )
    chunks: Tokens = tokens[: last * n_ctx].reshape(-1, n_ctx)[list(job.chunks)]
    return chunks


@dataclass
class _Progress:
    """Sends how many of ``total`` batches are done; a trial counts as many as it would take to its last chunk."""

    job: TrialsJob
    send: Send
    each: int
    done: int

    @property
    def total(self) -> int:
        return self.each * (1 + len(self.job.trials))

    def note(self, batches_done: int, note: str) -> None:
        self.send(Progress(self.job.step, self.done + batches_done, self.total, note))

    def next(self) -> None:
        self.done += self.each


@dataclass(frozen=True)
class _Trials:
    job: TrialsJob
    source: Source
    weights: LoadedWeights
    rounders: Rounders
    logits: ChunkLogits
    chunks: Tokens
    reference: ReferenceScores
    progress: _Progress

    def run(self, todo: Sequence[Trial], file: CostFile[TrialResult]) -> bool:
        """Returns false if a stop ended it."""
        known = len(file.records)
        if not self._keep_reference():
            return False
        for trial in todo:
            self.progress.next()
            result = self._measure(trial)
            if result is None:
                return False
            if trial is todo[-1] and not self._is_restored():
                file.cut(known)
                raise _not_restored(self.job.model, "it predicts otherwise than before the trials")
            file.append([result])
        return True

    def serve(self, send: Send) -> bool:
        """Measure the trials that the parent orders, until it ends; returns false if that ended one of them."""
        if not self._keep_reference():
            return False
        proven = False
        for place in self.logits.stop.units(range(len(self.job.trials)), ordered=True):
            self.progress.next()
            result = self._measure(self.job.trials[place])
            if result is None:
                return False
            # Every trial compares the weights' bytes after it; what the model predicts with them is looked at once.
            if not proven and not self._is_restored():
                raise _not_restored(self.job.model, "it predicts otherwise than before the trials")
            proven = True
            send(TrialMeasured(place, result))
        return True

    @property
    def _batches(self) -> Iterator[range]:
        return batches(0, len(self.chunks), self.logits.options)

    def _keep_reference(self) -> bool:
        for number, batch in enumerate(self._batches, 1):
            if self.logits.stop.requested:
                return False
            self.logits.compute(self._tokens(batch), batch.start, self.reference.keep, self.reference.take)
            self.progress.note(number, "as it is")
        self.reference.finish()
        return True

    def _tokens(self, batch: range) -> Tokens:
        return self.chunks[batch.start : batch.stop]

    def _measure(self, trial: Trial) -> TrialResult | None:
        """Round the trial's tensors, compute, and restore them; None after a stop, with the model as it happens to be."""
        logits = replace(self.logits, changed=f" with {trial.name} rounded")
        note = f"{self.job.trials.index(trial) + 1}/{len(self.job.trials)} {trial.name}"
        sums = np.zeros((len(self.chunks), 3))

        def compare(values: F32, chunk: int, row: int, targets: Tokens) -> Sums:
            found = self.reference.compare(values, chunk, row, targets)
            if not np.isfinite(found).all():
                raise logits.no_numbers_in(chunk)
            return found

        def add(chunk: int, _row: int, found: Sums) -> None:
            sums[chunk] += found

        if not self._round(trial):
            return None
        done = 0
        for number, batch in enumerate(self._batches, 1):
            if logits.stop.requested:
                return None
            logits.compute(self._tokens(batch), batch.start, compare, add)
            self.progress.note(number, note)
            done = batch.stop
            if is_enough(sums[:done, 0], self.job.enough):
                break
        self._restore(trial)
        return self.reference.result(trial.name, self.job.chunks[:done], sums[:done])

    def _round(self, trial: Trial) -> bool:
        """Overwrite the trial's tensors with rounded numbers; returns false after a stop."""
        wanted = 0
        for slab, (old, new) in self.rounders.map(_rounded, self._slabs(trial)):
            offset = _offset(slab)
            if not self.weights.holds(slab.name, offset, old):
                raise not_writable(slab.name, "llama.cpp holds other bytes of it than the file")
            self.weights.write(slab.name, offset, new)
            wanted += slab.n_elements
        return wanted == sum(self.source.tensor(tensor.name).n_elements for tensor in trial.tensors)

    def _restore(self, trial: Trial) -> None:
        for slab, old in self.rounders.map(_original, self._slabs(trial)):
            self.weights.write(slab.name, _offset(slab), old)
            if not self.weights.holds(slab.name, _offset(slab), old):
                raise _not_restored(self.job.model, f"{slab.name} has other bytes in memory than in the file")

    def _slabs(self, trial: Trial) -> Iterator[Slab]:
        for tensor in trial.tensors:
            for slab in self.source.slabs([tensor]):
                if self.logits.stop.requested:
                    return
                yield slab

    def _is_restored(self) -> bool:
        """Whether the first batch has the same logits as before the trials, to the bit."""
        first = next(self._batches)
        same: list[bool] = []

        def work(values: F32, chunk: int, row: int, _targets: Tokens) -> bool:
            return self.reference.is_same(chunk, row, checksum(values))

        self.logits.compute(self._tokens(first), first.start, work, lambda _chunk, _row, found: same.append(found))
        return all(same)


def _rounded(rounder: Rounder, slab: Slab) -> tuple[bytes, bytes]:
    """A slab's bytes in the model's file, and those of its rounded numbers in the same type."""
    old = bytes(rounder.read(slab))
    rounder.widen(slab)
    rounder.round(slab, slab.parts[0])
    return old, bytes(rounder.narrow(slab))


def _original(rounder: Rounder, slab: Slab) -> bytes:
    return bytes(rounder.read(slab))


def _offset(slab: Slab) -> int:
    return slab.rows.start * slab.tensor.kind.row_bytes(slab.tensor.n_per_row)


def _not_restored(model: Path, why: str) -> Refusal:
    return Refusal.failed(
        f"{model.name} could not be restored in memory", why, "Run the same command again; report it if it comes back."
    )
