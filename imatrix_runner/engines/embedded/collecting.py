"""The worker's main job: chunks through llama.cpp, range by range, each range's sums into a file of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatrix_runner.engines.base import ChunkRange
from imatrix_runner.engines.embedded import sums
from imatrix_runner.engines.embedded.batches import Slice, batches, slices
from imatrix_runner.engines.embedded.collector import Collector
from imatrix_runner.engines.embedded.library import load
from imatrix_runner.engines.embedded.nonfinite import NonFiniteInputError, refuse
from imatrix_runner.engines.embedded.proof import check
from imatrix_runner.engines.embedded.protocol import Answer, Collect, Collected
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.engines.embedded.scoring import score
from imatrix_runner.engines.embedded.session import Session, open_session, usable_cpus
from imatrix_runner.engines.embedded.stdin import Stop
from imatrix_runner.engines.embedded.tokens import Tokens, tokenize
from imatrix_runner.events import Metric, Progress

_PROBE_TOKENS = 32


def collect(request: Collect, tell: Callable[[Answer], None]) -> None:
    """Compute every range of the request; at a stop finish the batch, leave what there is, and end."""
    began = time.monotonic()
    library = load()
    options = request.options
    collector = Collector(library, check(library), process_output=options.process_output, all_logits=options.ppl)
    threads = options.threads or usable_cpus()
    with (
        closing(collector),
        ThreadPoolExecutor(threads) as pool,
        open_session(library, request.model, options, collector.callback) as session,
    ):
        tokens = tokenize(library, session.vocab, request.text, parse_special=options.parse_special)
        last = max(first + count for first, count in request.ranges)
        if len(tokens) < last * options.n_ctx:
            raise Refusal.invalid(
                f"The calibration text has {len(tokens)} tokens, too few for {last} chunks of {options.n_ctx}",
                "it is shorter than it was when it was counted",
                "Run the same command again.",
            )
        job = _Job(request, session, collector, tokens, Stop(), pool, tell)
        job.learn()
        load_seconds = time.monotonic() - began
        for first, count in request.ranges:
            if not job.compute(ChunkRange(first, count), load_seconds):
                return
            load_seconds = 0.0


@dataclass
class _Job:
    request: Collect
    session: Session
    collector: Collector
    tokens: Tokens
    stop: Stop
    pool: ThreadPoolExecutor
    tell: Callable[[Answer], None]
    done: int = 0
    nll: float = 0.0
    scored: int = 0

    def learn(self) -> None:
        """A few tokens through the whole model: proves that it computes and is watched, and shows where its last input is."""
        piece = Slice(1, 0, min(self.request.options.n_ctx, _PROBE_TOKENS))
        self.session.forget()
        self.collector.begin(learn=True)
        self.session.compute(np.resize(self.tokens, (1, piece.end)), piece)
        self._check(piece, range(1))
        if not self.collector.take():
            raise Refusal.failed(
                f"Nothing can be collected from {self.request.model.name}",
                "llama.cpp multiplied with no weight of a block where it could be watched",
                "Use --engine binaries.",
            )

    def compute(self, piece: ChunkRange, load_seconds: float) -> bool:
        """One range into its file; false when stopped before its end, with what was done left beside."""
        request = self.request
        partial = (request.folder / piece.file_name).with_suffix(".partial")
        watched = self.collector.seconds
        work = sums.resume(partial, request.fingerprint)
        self.collector.entries = work.entries
        self.done += work.done
        for batch in batches(piece.first + work.done, piece.count - work.done, request.options):
            if self.stop.requested:
                self._save(partial, work)
                return False
            began = time.monotonic()
            self._batch(batch, work)
            work.done += len(batch)
            work.seconds += time.monotonic() - began
            self._progress(len(batch), work)
        work.entries = self.collector.take()
        self._save(request.folder / piece.file_name, work)
        partial.unlink(missing_ok=True)
        self.nll, self.scored = self.nll + work.nll, self.scored + work.scored
        path = request.folder / piece.file_name
        watched = self.collector.seconds - watched
        self.tell(
            Collected(piece.first, piece.count, path, work.seconds, load_seconds, work.nll, work.nll2, work.scored, watched)
        )
        return True

    def _save(self, path: Path, work: sums.Range) -> None:
        work.entries = work.entries or self.collector.entries
        sums.write(
            path,
            work,
            n_ctx=self.request.options.n_ctx,
            dataset=self.request.text.name,
            fingerprint=self.request.fingerprint,
        )

    def _batch(self, batch: range, work: sums.Range) -> None:
        options, session = self.request.options, self.session
        n_ctx = options.n_ctx
        chunks = self.tokens[batch.start * n_ctx : batch.stop * n_ctx].reshape(len(batch), n_ctx)
        seen = chunks.copy()
        if session.add_bos:
            seen[:, 0] = session.bos
        session.forget()
        for piece in slices(len(batch), options):
            self.collector.begin()
            session.compute(seen[:, piece.begin : piece.end], piece)
            self._check(piece, batch)
            if options.ppl:
                self._score(chunks, piece, batch, work)

    def _check(self, piece: Slice, batch: range) -> None:
        """Raise what went wrong while ``piece`` of the chunks ``batch`` was computed."""
        try:
            self.collector.check(piece.n_tokens)
        except NonFiniteInputError as error:
            rows = range(piece.n_tokens) if error.row is None else range(error.row, error.row + 1)
            first, last = (batch.start + row // (piece.end - piece.begin) for row in (rows[0], rows[-1]))
            raise self._no_numbers(f"the activations that {error.weight} meets in {_chunks(first, last)}") from error

    def _no_numbers(self, seen: str) -> Refusal:
        request = self.request
        return refuse(self.session.library, request.model, seen, request.options.threads, self.stop)

    def _score(self, chunks: Tokens, piece: Slice, batch: range, work: sums.Range) -> None:
        """The predictions of the second half, but of the last token, whose successor is not of the chunk."""
        n_ctx = self.request.options.n_ctx
        begin, end = max(piece.begin, n_ctx // 2), min(piece.end, n_ctx - 1)
        if begin >= end:
            return
        logits = self.session.logits(piece.n_tokens).reshape(piece.n_seq, piece.end - piece.begin, -1)
        for number, chunk, rows in zip(batch, chunks, logits, strict=True):
            nll, nll2 = score(rows[begin - piece.begin : end - piece.begin], chunk[begin + 1 : end + 1], self.pool)
            if not math.isfinite(nll2):  # as soon as one logit of a row is NaN or infinite
                raise self._no_numbers(f"its logits in {_chunks(number, number)}")
            work.nll, work.nll2, work.scored = work.nll + nll, work.nll2 + nll2, work.scored + end - begin

    def _progress(self, n_chunks: int, work: sums.Range) -> None:
        self.done += n_chunks
        scored = self.scored + work.scored
        if scored:
            self.tell(Metric(self.request.step, "ppl", float(np.exp(min((self.nll + work.nll) / scored, 700.0)))))
        self.tell(Progress(self.request.step, self.done, sum(count for _, count in self.request.ranges)))


def _chunks(first: int, last: int) -> str:
    """Chunks by number, the text's first is 1."""
    return f"chunk {first + 1}" if first == last else f"chunks {first + 1} to {last + 1}"
