"""Covariance job: computes the text once for each group of inputs, and writes each input's covariance to its own file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from imatrix_runner.engines.covariance_jobs import CovarianceJob, WeightInput, grouped
from imatrix_runner.engines.files.covariance_file import (
    VERSION,
    CovarianceHead,
    file_name,
    read_covariance_head,
    remove_others,
    stored_covariances,
    write_covariance,
    write_covariance_index,
)
from imatrix_runner.engines.protocol import CovariancesCollected, Send
from imatrix_runner.engines.worker.abi_check import check
from imatrix_runner.engines.worker.batching import batches
from imatrix_runner.engines.worker.collect.chunk_feed import ChunkFeed, text_tokens
from imatrix_runner.engines.worker.collect.covariance_callback import CovarianceWatch, InputSums
from imatrix_runner.engines.worker.collect.gram_kernel import GramKernel
from imatrix_runner.engines.worker.collect.unfinished_sums import NAME, Unfinished, find_unfinished, save_unfinished
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.llama_context import load_context, usable_cpus
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Progress
from imatrix_runner.files import free_bytes, human_bytes

_SAVE_SHARE = 0.05
"""Saving unfinished sums takes at most this share of the time."""


def collect_covariances(job: CovarianceJob, send: Send) -> None:
    """Compute every group of inputs that has no files yet; at a stop finish the batch, save the sums, and end."""
    if stored_covariances(job.folder, job.fingerprint):
        send(CovariancesCollected(done=True, groups=0, seconds=0.0, watching_seconds=0.0))
        return
    began = time.monotonic()
    remove_others(job.folder, job.fingerprint)
    library, options = load(), job.options
    operations = check(library)
    threads = options.threads or usable_cpus()
    with ThreadPoolExecutor(threads) as pool:
        watch = CovarianceWatch(library, operations, job.weights, GramKernel(job.native, pool, threads))
        with load_context(library, job.model, options, watch.callback) as context:
            stop = StdinStop()
            tokens = text_tokens(context, job.text, options, max(chunks.end for chunks in job.ranges))
            feed = ChunkFeed(job.model, options, context, watch, tokens, stop)
            feed.learn()
            work = _Collection(job, watch, feed, stop, send)
            groups = work.run(watch.inputs())
    seconds = time.monotonic() - began
    send(CovariancesCollected(groups is not None, groups or 0, seconds, watch.seconds))


@dataclass
class _Collection:
    job: CovarianceJob
    watch: CovarianceWatch
    feed: ChunkFeed
    stop: StdinStop
    send: Send
    names: dict[WeightInput, str] = field(default_factory=dict)

    def run(self, inputs: Sequence[WeightInput]) -> int | None:
        """Collect all inputs. Returns how often the text was computed; None after a stop."""
        job = self.job
        if not inputs:
            raise Refusal.failed(
                f"No covariance can be collected from {job.model.name}",
                "the callback saw no product with a weight that is wanted",
                "Use --rounding refined, which needs none.",
            )
        heads = {file_name(number): self._finished(file_name(number), each) for number, each in enumerate(inputs)}
        self.names = {each: name for name, each in zip(heads, inputs, strict=True)}
        missing = [each for each in inputs if heads[self.names[each]] is None]
        unfinished = find_unfinished(job.folder / NAME, job.fingerprint)
        groups = _groups(missing, unfinished, job.memory_bytes)
        for number, group in enumerate(groups):
            if not self._collect(group, unfinished, number, len(groups)):
                return None
        (job.folder / NAME).unlink(missing_ok=True)
        found = {name: read_covariance_head(job.folder / name) for name in heads}
        write_covariance_index(job.folder, job.fingerprint, found)
        return len(groups)

    def _finished(self, name: str, wanted: WeightInput) -> CovarianceHead | None:
        """The head of an input's file; None if it was not written yet."""
        try:
            head = read_covariance_head(self.job.folder / name)
        except InvalidDataError:
            return None
        same = (head.fingerprint, head.weights, head.columns, len(head.tokens)) == (
            self.job.fingerprint,
            wanted.weights,
            wanted.columns,
            wanted.matrices,
        )
        return head if same else None

    def _collect(self, group: Sequence[WeightInput], unfinished: Unfinished | None, number: int, n_groups: int) -> bool:
        """Compute one group and write its files. Returns false if stopped before its end; the sums so far are then saved."""
        job = self.job
        todo = [batch for chunks in job.ranges for batch in batches(chunks.first, chunks.count, job.options)]
        n_chunks, first = sum(map(len, todo)), 0
        sums = None
        if unfinished is not None and unfinished.batches <= len(todo) and set(group) <= set(unfinished.inputs):
            sums, first = unfinished.load(group), unfinished.batches
        if sums is None:
            sums, first = [InputSums.zero(each) for each in group], 0
        self.watch.select(sums)
        done = number * n_chunks + sum(map(len, todo[:first]))
        saved, pause = time.monotonic(), job.save_seconds
        for index, batch in enumerate(todo[first:], first):
            if self.stop.requested:
                save_unfinished(job.folder / NAME, job.fingerprint, index, sums)
                return False
            if (began := time.monotonic()) - saved > pause and self._has_room(group):
                save_unfinished(job.folder / NAME, job.fingerprint, index, sums)
                saved = time.monotonic()
                pause = max(job.save_seconds, (saved - began) / _SAVE_SHARE)
            for _ in self.feed.compute(batch):
                pass
            done += len(batch)
            self.send(Progress(job.step, done, n_groups * n_chunks))
        for each in sums:
            self._write(each)
        self.watch.select(())  # before the next group's memory is taken
        return True

    def _has_room(self, group: Sequence[WeightInput]) -> bool:
        """Whether the disk takes unfinished sums next to those that they replace; without them only a kill costs time."""
        return free_bytes(self.job.folder) > sum(each.sum_bytes for each in group) + sum(each.file_bytes for each in group)

    def _write(self, summed: InputSums) -> None:
        wanted, tokens = summed.input, tuple(summed.counts.tolist())
        head = CovarianceHead(VERSION, self.job.fingerprint, wanted.weights, wanted.columns, tokens)
        write_covariance(self.job.folder / self.names[wanted], head, lambda matrix: summed.sums[matrix])


def _groups(missing: Sequence[WeightInput], unfinished: Unfinished | None, memory_bytes: int) -> list[tuple[WeightInput, ...]]:
    """The groups of inputs to collect; first that of the unfinished sums, as far as it has no files yet. Raises
    :class:`Refusal` for an input that does not fit into ``memory_bytes``."""
    for each in missing:
        if each.sum_bytes > memory_bytes:
            raise Refusal.failed(
                f"The covariance of the input of {each.weights[0]} does not fit into memory",
                f"its sums take {human_bytes(each.sum_bytes)}, and {human_bytes(memory_bytes)} may be used",
                "Allow more memory, close other programs, or use --rounding refined, which needs no covariances.",
            )
    begun = [each for each in missing if unfinished is not None and each in unfinished.inputs]
    if sum(each.sum_bytes for each in begun) > memory_bytes:
        begun = []
    rest = [each for each in missing if each not in begun]
    return ([tuple(begun)] if begun else []) + list(grouped(rest, memory_bytes))
