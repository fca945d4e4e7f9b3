"""Evaluation jobs: write a model's predictions on a text as the reference, or compare them with a reference."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.logits import LogitsHead, Rows, read_head, read_rows, read_tokens
from imatrix_runner.engines.files.logits_writer import LogitsWriter
from imatrix_runner.engines.files.token_scores import TOKEN, TokenScoresFile
from imatrix_runner.engines.measures import MeasureJob, ReferenceJob
from imatrix_runner.engines.protocol import Send, TokensMeasured
from imatrix_runner.engines.worker.evaluate.chunk_logits import open_chunk_logits
from imatrix_runner.engines.worker.evaluate.logit_math import compare_rows, keep_rows
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.tokens import Tokens, tokenize
from imatrix_runner.events import Progress

F32 = npt.NDArray[np.float32]


def write_reference(job: ReferenceJob, send: Send) -> None:
    """Write the reference's log-probabilities; after a stop the same job continues from the complete batches."""
    began = time.monotonic()
    options, chunks = job.options, job.chunks
    numbers = job.order or range(chunks.first, chunks.end)
    with open_chunk_logits(job.model, options, numbers) as work:
        tokens = tokenize(work.context.library, work.context.vocab, job.text, parse_special=options.parse_special)
        needed = max(numbers) + 1
        if len(tokens) < needed * options.n_ctx:
            raise Refusal.invalid(
                f"The text has {len(tokens)} tokens, too few for {needed} chunks of {options.n_ctx}",
                "it is shorter now than when its tokens were counted",
                "Run the same command again.",
            )
        rows = tokens[: needed * options.n_ctx].reshape(-1, options.n_ctx)[list(numbers)]
        head = LogitsHead(options.n_ctx, work.context.n_vocab, chunks.count)
        with ExitStack() as files:
            base = files.enter_context(closing(LogitsWriter(job.out, head, rows, job.fingerprint)))
            scored = _open_token_scores(job, files)
            before = 0 if job.alone else chunks.first
            done = base.chunks if scored is None else min(base.chunks, max(0, scored.chunks - before))
            done = done // options.chunks_at_once * options.chunks_at_once
            base.cut(done)
            if scored is not None and scored.chunks < before + chunks.count:
                scored.cut(before + done)
            loaded = time.monotonic()

            exact, begun = _Chunks(), done

            def take(chunk: int, row: int, kept: tuple[Rows, F32]) -> None:
                base.write(chunk, row, kept[0])
                if scored is not None and before + chunk >= scored.chunks:
                    exact.take(chunk, row, _exact(kept[1]))

            def finish() -> None:
                base.sync()
                if scored is not None:
                    exact.move_to(scored)

            def progress(n: int) -> None:
                if n <= begun + options.chunks_at_once:  # checked after the first batch, before the others take hours
                    work.refuse_no_language_model(job.out, head, n)
                send(Progress(job.step, n, chunks.count))

            done = work.run(rows, done, _keep, take, finish, progress)
    send(TokensMeasured(done, done == chunks.count, time.monotonic() - loaded, loaded - began))


def measure(job: MeasureJob, send: Send) -> None:
    """Compare a level with the reference, chunk by chunk."""
    began = time.monotonic()
    head = read_head(job.base)
    options = job.options
    with open_chunk_logits(job.model, options, range(job.first, job.first + head.n_chunks)) as work:
        if work.context.n_vocab != head.n_vocab or options.n_ctx != head.n_ctx:
            raise Refusal.invalid(
                f"{job.model.name} cannot be compared with {job.base.name}",
                f"the level has a vocabulary of {work.context.n_vocab} tokens, the reference one of {head.n_vocab}"
                if work.context.n_vocab != head.n_vocab
                else f"the reference was made with chunks of {head.n_ctx} tokens, not {options.n_ctx}",
                "Compare a level with the model it was made from.",
            )
        count = head.n_chunks if job.limit is None else min(job.limit, head.n_chunks)
        chunks = read_tokens(job.base, head)[:count]
        before = 0 if job.alone else job.first
        with closing(TokenScoresFile(job.out, job.fingerprint, head.n_ctx)) as scored:
            if scored.chunks < before:
                raise Refusal.failed(
                    f"{job.model.name} was compared with {scored.chunks} chunks only",
                    f"the reference at hand begins with chunk {job.first}",
                )
            done = scored.chunks - before
            if done < count:
                done = done // options.chunks_at_once * options.chunks_at_once
                scored.cut(before + done)
                work.refuse_bad_tensors()
            loaded = time.monotonic()

            def compare(logits: F32, chunk: int, row: int, targets: Tokens) -> npt.NDArray[np.void]:
                tokens = compare_rows(logits, read_rows(job.base, head, chunk, row, len(targets)), targets)
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
                lambda n: send(Progress(job.step, job.first + n)),
            )
    send(TokensMeasured(done, done >= count, time.monotonic() - loaded, loaded - began))


class _Chunks:
    """Collects the token scores of a batch by chunk: they arrive by slices of all its chunks."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[npt.NDArray[np.void]]] = {}

    def take(self, chunk: int, _row: int, tokens: npt.NDArray[np.void]) -> None:
        self._waiting.setdefault(chunk, []).append(tokens)

    def move_to(self, scored: TokenScoresFile) -> None:
        for chunk in sorted(self._waiting):
            scored.append(self._waiting[chunk])
        self._waiting.clear()
        scored.sync()


def _keep(logits: F32, _chunk: int, _row: int, targets: Tokens) -> tuple[Rows, F32]:
    return keep_rows(logits, targets)


def _open_token_scores(job: ReferenceJob, files: ExitStack) -> TokenScoresFile | None:
    """The file for the reference's exact scores; None if the job has none, or if the file lacks chunks before the job's."""
    if job.scored is None:
        return None
    scored = files.enter_context(closing(TokenScoresFile(*job.scored, job.options.n_ctx)))
    return scored if job.alone or scored.chunks >= job.chunks.first else None


def _exact(nll: F32) -> npt.NDArray[np.void]:
    """The reference's scores as a comparison with itself: :data:`TOKEN` [n]."""
    tokens = np.zeros(len(nll), TOKEN)
    tokens["nll"], tokens["base"], tokens["same"] = nll, nll, 1
    return tokens
