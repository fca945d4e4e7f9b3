"""Collection job: computes chunks with llama.cpp, range by range, and writes each range's sums to its own file."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatrix_runner.engines.jobs import ChunkRange, CollectJob
from imatrix_runner.engines.protocol import Collected, Send
from imatrix_runner.engines.worker.abi_check import check
from imatrix_runner.engines.worker.batching import MicroBatch, batches
from imatrix_runner.engines.worker.collect import sums_file
from imatrix_runner.engines.worker.collect.chunk_feed import ChunkFeed, chunk_phrase, text_tokens
from imatrix_runner.engines.worker.collect.graph_callback import Collector
from imatrix_runner.engines.worker.evaluate.logit_math import score
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.llama_context import load_context, usable_cpus
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.events import Metric, Progress


def collect(job: CollectJob, send: Send) -> None:
    """Compute every range of the job; at a stop finish the batch, save the sums, and end."""
    began = time.monotonic()
    library = load()
    options = job.options
    collector = Collector(library, check(library), process_output=options.process_output, all_logits=options.ppl)
    threads = options.threads or usable_cpus()
    with (
        closing(collector),
        ThreadPoolExecutor(threads) as pool,
        load_context(library, job.model, options, collector.callback) as context,
    ):
        stop = StdinStop()
        tokens = text_tokens(context, job.text, options, max(chunks.end for chunks in job.ranges))
        feed = ChunkFeed(job.model, options, context, collector, tokens, stop)
        work = _Collection(job, collector, feed, stop, pool, send)
        work.learn()
        load_seconds = time.monotonic() - began
        for chunks in stop.units(job.ranges, ordered=job.ordered):
            if not work.compute(chunks, load_seconds):
                return
            load_seconds = 0.0


@dataclass
class _Collection:
    job: CollectJob
    collector: Collector
    feed: ChunkFeed
    stop: StdinStop
    pool: ThreadPoolExecutor
    send: Send
    done: int = 0
    nll: float = 0.0
    scored: int = 0

    def learn(self) -> None:
        """Compute a few tokens with the whole model to check that products are seen and find where the last input is made."""
        self.feed.learn()
        if not self.collector.take():
            raise Refusal.failed(
                f"Nothing can be collected from {self.job.model.name}",
                "the callback saw no product with a weight of a block",
                "Use --engine binaries.",
            )

    def compute(self, wanted: ChunkRange, load_seconds: float) -> bool:
        """Compute one range into its file. Returns false if stopped before its end; the sums so far are then in a ``.partial``
        file next to it."""
        job = self.job
        partial = (job.folder / wanted.file_name).with_suffix(".partial")
        watched = self.collector.seconds
        work = sums_file.resume(partial, job.fingerprint)
        self.collector.entries = work.entries
        self.done += work.done
        for batch in batches(wanted.first + work.done, wanted.count - work.done, job.options):
            if self.stop.requested:
                self._save(partial, work)
                return False
            began = time.monotonic()
            for ubatch in self.feed.compute(batch):
                if job.options.ppl:
                    self._score(ubatch, batch, work)
            work.done += len(batch)
            work.seconds += time.monotonic() - began
            self._progress(len(batch), work)
        work.entries = self.collector.take()
        self._save(job.folder / wanted.file_name, work)
        partial.unlink(missing_ok=True)
        self.nll, self.scored = self.nll + work.nll, self.scored + work.scored
        path = job.folder / wanted.file_name
        watched = self.collector.seconds - watched
        self.send(
            Collected(wanted.first, wanted.count, path, work.seconds, load_seconds, work.nll, work.nll2, work.scored, watched)
        )
        return True

    def _save(self, path: Path, work: sums_file.Range) -> None:
        work.entries = work.entries or self.collector.entries
        sums_file.write(
            path,
            work,
            n_ctx=self.job.options.n_ctx,
            dataset=self.job.text.name,
            fingerprint=self.job.fingerprint,
        )

    def _score(self, ubatch: MicroBatch, batch: range, work: sums_file.Range) -> None:
        """Score the predictions in the second half, except the last, whose target is not in the chunk."""
        n_ctx = self.job.options.n_ctx
        begin, end = max(ubatch.begin, n_ctx // 2), min(ubatch.end, n_ctx - 1)
        if begin >= end:
            return
        logits = self.feed.context.logits(ubatch.n_tokens).reshape(ubatch.n_seq, ubatch.end - ubatch.begin, -1)
        for number, chunk, rows in zip(batch, self.feed.chunks(batch), logits, strict=True):
            nll, nll2 = score(rows[begin - ubatch.begin : end - ubatch.begin], chunk[begin + 1 : end + 1], self.pool)
            if not math.isfinite(nll2):  # as soon as one logit of a row is NaN or infinite
                raise self.feed.no_numbers(f"its logits in {chunk_phrase(number, number)}")
            work.nll, work.nll2, work.scored = work.nll + nll, work.nll2 + nll2, work.scored + end - begin

    def _progress(self, n_chunks: int, work: sums_file.Range) -> None:
        self.done += n_chunks
        scored = self.scored + work.scored
        if scored:
            self.send(Metric(self.job.step, "ppl", float(np.exp(min((self.nll + work.nll) / scored, 700.0)))))
        self.send(Progress(self.job.step, self.done, sum(chunks.count for chunks in self.job.ranges)))
