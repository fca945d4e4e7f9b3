"""Computes chunks of a text with llama.cpp, and passes on the logits of their scored tokens while the next are computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imatrix_runner.engines.files.logits import LogitsHead
from imatrix_runner.engines.files.plausible import no_language_model, no_reference
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.worker.abi_check import check
from imatrix_runner.engines.worker.batching import batches, micro_batches
from imatrix_runner.engines.worker.evaluate.logit_math import F32, block_rows
from imatrix_runner.engines.worker.library import load
from imatrix_runner.engines.worker.llama_context import LlamaContext, load_context, usable_cpus
from imatrix_runner.engines.worker.nonfinite import refuse
from imatrix_runner.engines.worker.quantize.check_rows import bad_tensor
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.engines.worker.tokens import Tokens
from imatrix_runner.models.finite import non_finite_error
from imatrix_runner.models.gguf_names import shard_names

Work = Callable[[F32, int, int, Tokens], Any]
"""Called in parallel with a block of a chunk's logits [n, n_vocab], the number of the chunk, that of its first row, and the
tokens that the rows predict."""

Take = Callable[[int, int, Any], None]
"""Called in order with the number of a chunk, that of a row, and what :data:`Work` returned for the block beginning there."""


@contextmanager
def open_chunk_logits(model: Path, options: CollectOptions, numbers: Sequence[int]) -> Iterator[ChunkLogits]:
    """Load a model to measure the second half of each chunk. ``numbers``: of the job's chunks in the text, from 0."""
    library = load()
    check(library)
    threads = options.threads or usable_cpus()
    with ThreadPoolExecutor(threads) as pool, load_context(library, model, options, None) as context:
        yield ChunkLogits(context, pool, options, StdinStop(), model, numbers, options.n_ctx // 2)


@dataclass(frozen=True)
class ChunkLogits:
    """Computes chunks with a loaded model. ``first_scored``: position of the first token whose logits are of interest, the
    chunk's row 0. ``changed`` says in an error what was done to the model."""

    context: LlamaContext
    pool: ThreadPoolExecutor
    options: CollectOptions
    stop: StdinStop
    model: Path
    numbers: Sequence[int]
    first_scored: int
    changed: str = ""

    def run(
        self,
        chunks: Tokens,
        done: int,
        work: Work,
        take: Take,
        finish: Callable[[], None],
        send: Callable[[int], None],
    ) -> int:
        """Compute ``chunks`` int32 [n, n_ctx] from number ``done`` on; returns how many are done.

        ``take`` gets each result of ``work`` at once, because a chunk's rows take 65 MB with a large vocabulary; the last rows
        of a batch's last chunk come last. ``finish`` is called after every batch, then ``send`` with the number of chunks done.
        """
        for batch in batches(done, len(chunks) - done, self.options):
            if self.stop.requested:
                break
            self.compute(chunks[batch.start : batch.stop], batch.start, work, take)
            finish()
            done = batch.stop
            send(done)
        return done

    def compute(self, chunks: Tokens, number: int, work: Work, take: Take) -> None:
        """Compute one batch, ``chunks`` int32 [n, n_ctx] from number ``number`` on."""
        context, n_ctx, first = self.context, self.options.n_ctx, self.first_scored
        seen = chunks.copy()
        if context.add_bos:
            seen[:, 0] = context.bos
        context.forget()
        for ubatch in micro_batches(len(chunks), self.options):
            count = context.compute(seen[:, ubatch.begin : ubatch.end], ubatch, first)
            if not count:
                continue
            logits = context.logits(count).reshape(len(chunks), -1, context.n_vocab)
            begin = max(ubatch.begin, first)
            end = min(ubatch.end, n_ctx - 1)  # the last token has nothing to predict
            step = block_rows(context.n_vocab)
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
        """Raise :class:`Refusal` for a file with NaN or infinity. Logits do not always show it: where ggml quantises
        activations to 8 bits, a NaN in a norm becomes a number."""
        files = tuple(self.model.with_name(name) for name in shard_names(self.model))
        tensor = bad_tensor(self.context.library, files, self.options.threads, self.stop)
        if tensor:
            error = non_finite_error(self.model, f"numbers in its tensor {tensor}", "")
            raise Refusal.invalid(error.what, error.why, error.todo)

    def refuse_no_language_model(self, base: Path, head: LogitsHead, n_chunks: int) -> None:
        if why := no_language_model(base, head, n_chunks):
            raise Refusal.invalid(*no_reference(self.model.name, why))

    def no_numbers_in(self, chunk: int) -> Refusal:
        """The error for NaN or infinite logits. ``chunk``: number in the job, from 0."""
        seen = f"its logits in chunk {self.numbers[chunk] + 1}{self.changed}"
        return refuse(self.context.library, self.model, seen, self.options.threads, self.stop)
