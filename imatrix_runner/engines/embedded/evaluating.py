"""The worker's other job: a model's predictions over a text, kept as the reference, or compared with one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.base import CollectOptions
from imatrix_runner.engines.embedded.batches import batches, slices
from imatrix_runner.engines.embedded.judging import TOKEN, block_rows, compare_rows, keep_rows
from imatrix_runner.engines.embedded.library import load
from imatrix_runner.engines.embedded.nonfinite import refuse
from imatrix_runner.engines.embedded.proof import check
from imatrix_runner.engines.embedded.protocol import Answer, Judge, Judged, Refer
from imatrix_runner.engines.embedded.refusal import Refusal
from imatrix_runner.engines.embedded.scored import ScoredFile
from imatrix_runner.engines.embedded.session import Session, open_session, usable_cpus
from imatrix_runner.engines.embedded.stdin import Stop
from imatrix_runner.engines.embedded.tokens import Tokens, tokenize
from imatrix_runner.engines.embedded.validating import bad_tensor
from imatrix_runner.engines.logits_file import LogitsHead, Rows, note_path, read_head, read_rows, read_tokens
from imatrix_runner.engines.plausible import no_language_model, no_reference
from imatrix_runner.events import Progress
from imatrix_runner.files import sync
from imatrix_runner.models.finite import no_numbers
from imatrix_runner.models.gguf_names import shard_names

F32 = npt.NDArray[np.float32]


def refer(request: Refer, tell: Callable[[Answer], None]) -> None:
    """Write the reference's log-probabilities; at a stop what is whole stays, and the same request continues."""
    began = time.monotonic()
    options = request.options
    with _evaluation(request.model, options, request.first) as work:
        tokens = tokenize(work.session.library, work.session.vocab, request.text, parse_special=options.parse_special)
        end = request.first + request.count
        if len(tokens) < end * options.n_ctx:
            raise Refusal.invalid(
                f"The text has {len(tokens)} tokens, too few for {end} chunks of {options.n_ctx}",
                "it is shorter than it was when it was counted",
                "Run the same command again.",
            )
        chunks = tokens[request.first * options.n_ctx : end * options.n_ctx].reshape(-1, options.n_ctx)
        head = LogitsHead(options.n_ctx, work.session.n_vocab, request.count)
        with ExitStack() as files:
            base = files.enter_context(closing(_BaseFile(request.out, head, chunks, request.fingerprint)))
            scored = _open_scored(request, files)
            done = base.chunks if scored is None else min(base.chunks, max(0, scored.chunks - request.first))
            done = done // options.chunks_at_once * options.chunks_at_once
            base.cut(done)
            if scored is not None and scored.chunks < request.first + request.count:
                scored.cut(request.first + done)
            loaded = time.monotonic()

            exact, begun = _Chunks(), done

            def take(chunk: int, row: int, kept: tuple[Rows, F32]) -> None:
                base.write(chunk, row, kept[0])
                if scored is not None and request.first + chunk >= scored.chunks:
                    exact.take(chunk, row, _exact(kept[1]))

            def finish() -> None:
                base.sync()
                if scored is not None:
                    exact.move_to(scored)

            def progress(n: int) -> None:
                if n <= begun + options.chunks_at_once:  # the first batch, before hours go into the others
                    work.refuse_no_language_model(request.out, head, n)
                tell(Progress(request.step, n, request.count))

            done = work.run(chunks, done, _keep, take, finish, progress)
    tell(Judged(done, done == request.count, time.monotonic() - loaded, loaded - began))


def judge(request: Judge, tell: Callable[[Answer], None]) -> None:
    """Compare a level with the reference, chunk by chunk."""
    began = time.monotonic()
    head = read_head(request.base)
    options = request.options
    with _evaluation(request.model, options, request.first) as work:
        if work.session.n_vocab != head.n_vocab or options.n_ctx != head.n_ctx:
            raise Refusal.invalid(
                f"{request.model.name} cannot be compared with {request.base.name}",
                f"one has a vocabulary of {work.session.n_vocab} tokens, the other of {head.n_vocab}"
                if work.session.n_vocab != head.n_vocab
                else f"that was written with chunks of {head.n_ctx} tokens, not {options.n_ctx}",
                "Compare a level with the model it was made from.",
            )
        count = head.n_chunks if request.limit is None else min(request.limit, head.n_chunks)
        chunks = read_tokens(request.base, head)[:count]
        with closing(ScoredFile(request.out, request.fingerprint, head.n_ctx)) as scored:
            if scored.chunks < request.first:
                raise Refusal.failed(
                    f"{request.model.name} was compared with {scored.chunks} chunks only",
                    f"the reference at hand begins with chunk {request.first}",
                )
            done = scored.chunks - request.first
            if done < count:
                done = done // options.chunks_at_once * options.chunks_at_once
                scored.cut(request.first + done)
                work.refuse_bad_tensors()
            loaded = time.monotonic()

            def compare(logits: F32, chunk: int, row: int, targets: Tokens) -> npt.NDArray[np.void]:
                tokens = compare_rows(logits, read_rows(request.base, head, chunk, row, len(targets)), targets)
                if not np.isfinite(tokens["kld"]).all():
                    raise work.no_numbers_in(chunk)
                return tokens

            found = _Chunks()
            done = work.run(
                chunks,
                done,
                compare,
                found.take,
                lambda: found.move_to(scored),
                lambda n: tell(Progress(request.step, request.first + n)),
            )
    tell(Judged(done, done >= count, time.monotonic() - loaded, loaded - began))


class _Chunks:
    """Scored tokens of a batch, gathered chunk by chunk: they come by slices of all its chunks."""

    def __init__(self) -> None:
        self._pieces: dict[int, list[npt.NDArray[np.void]]] = {}

    def take(self, chunk: int, _row: int, tokens: npt.NDArray[np.void]) -> None:
        self._pieces.setdefault(chunk, []).append(tokens)

    def move_to(self, scored: ScoredFile) -> None:
        for chunk in sorted(self._pieces):
            scored.append(self._pieces[chunk])
        self._pieces.clear()
        scored.sync()


def _keep(logits: F32, _chunk: int, _row: int, targets: Tokens) -> tuple[Rows, F32]:
    return keep_rows(logits, targets)


def _open_scored(request: Refer, files: ExitStack) -> ScoredFile | None:
    """Where the reference's exact figures go. One that lacks chunks before these begins anew, and is then not kept at all."""
    if request.scored is None:
        return None
    scored = files.enter_context(closing(ScoredFile(*request.scored, request.options.n_ctx)))
    return scored if scored.chunks >= request.first else None


def _exact(nll: F32) -> npt.NDArray[np.void]:
    """The reference beside itself: :data:`TOKEN` [n]."""
    tokens = np.zeros(len(nll), TOKEN)
    tokens["nll"], tokens["base"], tokens["same"] = nll, nll, 1
    return tokens


@contextmanager
def _evaluation(model: Path, options: CollectOptions, first: int) -> Iterator[_Evaluation]:
    """``first``: number of the job's first chunk in the text."""
    library = load()
    check(library)
    threads = options.threads or usable_cpus()
    with ThreadPoolExecutor(threads) as pool, open_session(library, model, options, None) as session:
        yield _Evaluation(session, pool, options, Stop(), model, first)


@dataclass(frozen=True)
class _Evaluation:
    session: Session
    pool: ThreadPoolExecutor
    options: CollectOptions
    stop: Stop
    model: Path
    first: int

    def run(
        self,
        chunks: Tokens,
        done: int,
        work: Callable[[F32, int, int, Tokens], Any],
        take: Callable[[int, int, Any], None],
        finish: Callable[[], None],
        tell: Callable[[int], None],
    ) -> int:
        """Compute ``chunks`` int32 [n, n_ctx] from number ``done`` on; returns how many are done.

        ``work(logits, chunk, row, targets)`` is asked for blocks of a chunk's rows, side by side. ``take(chunk, row, result)``
        gets what it made, at once, so that nothing is held (of a large vocabulary a chunk's rows are 65 MB); the last rows of a
        batch's last chunk come last. ``finish`` is called after every batch.
        """
        for batch in batches(done, len(chunks) - done, self.options):
            if self.stop.requested:
                break
            self._batch(chunks[batch.start : batch.stop], batch.start, work, take)
            finish()
            done = batch.stop
            tell(done)
        return done

    def _batch(
        self,
        chunks: Tokens,
        number: int,
        work: Callable[[F32, int, int, Tokens], Any],
        take: Callable[[int, int, Any], None],
    ) -> None:
        session, n_ctx = self.session, self.options.n_ctx
        first = n_ctx // 2
        seen = chunks.copy()
        if session.add_bos:
            seen[:, 0] = session.bos
        session.forget()
        for piece in slices(len(chunks), self.options):
            count = session.compute(seen[:, piece.begin : piece.end], piece, first)
            if not count:
                continue
            logits = session.logits(count).reshape(len(chunks), -1, session.n_vocab)
            begin = max(piece.begin, first)
            end = min(piece.end, n_ctx - 1)  # the last token has nothing to predict
            step = block_rows(session.n_vocab)
            blocks = [(chunk, row, min(row + step, end)) for chunk in range(len(chunks)) for row in range(begin, end, step)]

            def block(place: tuple[int, int, int], logits: F32 = logits, begin: int = begin) -> Any:
                chunk, row, stop = place
                values = logits[chunk, row - begin : stop - begin]
                if not np.isfinite(values.max(axis=1)).all():
                    raise self.no_numbers_in(number + chunk)
                return work(values, number + chunk, row - first, chunks[chunk, row + 1 : stop + 1])

            for (chunk, row, _), result in zip(blocks, self.pool.map(block, blocks), strict=True):
                take(number + chunk, row - first, result)

    def refuse_bad_tensors(self) -> None:
        """Logits do not always tell: where ggml quantises activations to 8 bits, a NaN in a norm becomes some number."""
        files = tuple(self.model.with_name(name) for name in shard_names(self.model))
        tensor = bad_tensor(self.session.library, files, self.options.threads, self.stop)
        if tensor:
            error = no_numbers(self.model, f"numbers in its tensor {tensor}", "")
            raise Refusal.invalid(error.what, error.why, error.todo)

    def refuse_no_language_model(self, base: Path, head: LogitsHead, n_chunks: int) -> None:
        if why := no_language_model(base, head, n_chunks):
            raise Refusal.invalid(*no_reference(self.model.name, why))

    def no_numbers_in(self, chunk: int) -> Refusal:
        """``chunk``: its number in the job, from 0."""
        seen = f"its logits in chunk {self.first + chunk + 1}"
        return refuse(self.session.library, self.model, seen, self.options.threads, self.stop)


class _BaseFile:
    """The reference's file on its way: head and tokens at once, then rows. A fingerprint beside it says what it is of.

    Rows of a batch come by slices of all its chunks, those at its very end last: how long the file is tells how many batches
    are whole.
    """

    def __init__(self, path: Path, head: LogitsHead, chunks: Tokens, fingerprint: str) -> None:
        self._head = head
        note = note_path(path)
        start = head.pack() + chunks.astype("<i4").tobytes()
        same = note.is_file() and note.read_text(encoding="utf-8") == fingerprint and path.is_file()
        self._handle: IO[bytes] = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        same = same and self._handle.read(len(start)) == start
        size = path.stat().st_size
        self.chunks = max(0, size - head.rows_at) // head.chunk_bytes if same else 0
        self._syncer = ThreadPoolExecutor(1)
        self._synced: Future[None] = self._syncer.submit(lambda: None)
        if not same:
            self._handle.seek(0)
            self._handle.write(start)
            self._handle.truncate()
            note.write_text(fingerprint, encoding="utf-8")

    def cut(self, chunks: int) -> None:
        self.chunks = chunks
        self._handle.truncate(self._head.rows_at + chunks * self._head.chunk_bytes)

    def write(self, chunk: int, row: int, rows: Rows) -> None:
        self._handle.seek(self._head.rows_at + chunk * self._head.chunk_bytes + 2 * row * rows.shape[1])
        self._handle.write(rows.data)

    def sync(self) -> None:
        """Force what was written to the disk, while the next batch is computed: it is up to 260 MB."""
        self._handle.flush()
        self._synced.result()
        self._synced = self._syncer.submit(sync, self._handle.fileno())

    def close(self) -> None:
        with closing(self._handle), self._syncer:
            self._synced.result()
