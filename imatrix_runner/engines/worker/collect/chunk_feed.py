"""Feeds chunks of a text to llama.cpp while a callback watches the graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.worker.batching import MicroBatch, micro_batches
from imatrix_runner.engines.worker.collect.graph_watch import GraphWatch
from imatrix_runner.engines.worker.llama_context import LlamaContext
from imatrix_runner.engines.worker.nonfinite import NonFiniteInputError, refuse
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.stdin_stop import StdinStop
from imatrix_runner.engines.worker.tokens import Tokens, tokenize

_PROBE_TOKENS = 32


@dataclass(frozen=True)
class ChunkFeed:
    """The chunks of ``tokens``, computed by ``context`` as ``options`` say; ``watch`` has the context's callback."""

    model: Path
    options: CollectOptions
    context: LlamaContext
    watch: GraphWatch
    tokens: Tokens
    stop: StdinStop

    def learn(self) -> None:
        """Compute a few tokens with the whole model, to learn which products its graphs have."""
        ubatch = MicroBatch(1, 0, min(self.options.n_ctx, _PROBE_TOKENS))
        self.context.forget()
        self.watch.begin(learn=True)
        self.context.compute(np.resize(self.tokens, (1, ubatch.end)), ubatch)
        self._check(ubatch, range(1))

    def chunks(self, batch: range) -> Tokens:
        """int32 [n_chunks, n_ctx]: the tokens of chunks by number."""
        n_ctx = self.options.n_ctx
        return self.tokens[batch.start * n_ctx : batch.stop * n_ctx].reshape(len(batch), n_ctx)

    def compute(self, batch: range) -> Iterator[MicroBatch]:
        """Compute chunks in parallel, and yield each micro-batch after it was computed and watched."""
        context = self.context
        seen = self.chunks(batch).copy()
        if context.add_bos:
            seen[:, 0] = context.bos
        context.forget()
        for ubatch in micro_batches(len(batch), self.options):
            self.watch.begin()
            context.compute(seen[:, ubatch.begin : ubatch.end], ubatch)
            self._check(ubatch, batch)
            yield ubatch

    def no_numbers(self, seen: str) -> Refusal:
        """The refusal of a model whose results are NaN or infinite; ``seen`` says where."""
        return refuse(self.context.library, self.model, seen, self.options.threads, self.stop)

    def _check(self, ubatch: MicroBatch, batch: range) -> None:
        """Raise the error that occurred while ``ubatch`` of the chunks ``batch`` was computed, if any."""
        try:
            self.watch.check(ubatch.n_tokens)
        except NonFiniteInputError as error:
            rows = range(ubatch.n_tokens) if error.row is None else range(error.row, error.row + 1)
            first, last = (batch.start + row // (ubatch.end - ubatch.begin) for row in (rows[0], rows[-1]))
            raise self.no_numbers(f"the activations that {error.weight} meets in {chunk_phrase(first, last)}") from error


def text_tokens(context: LlamaContext, text: Path, options: CollectOptions, last: int) -> Tokens:
    """The tokens of a calibration text. Raises :class:`Refusal` if it has fewer than ``last`` chunks."""
    tokens = tokenize(context.library, context.vocab, text, parse_special=options.parse_special)
    if len(tokens) < last * options.n_ctx:
        raise Refusal.invalid(
            f"The calibration text has {len(tokens)} tokens, too few for {last} chunks of {options.n_ctx}",
            "it is shorter now than when its tokens were counted",
            "Run the same command again.",
        )
    return tokens


def chunk_phrase(first: int, last: int) -> str:
    """A phrase for chunks by number; the text's first is 1."""
    return f"chunk {first + 1}" if first == last else f"chunks {first + 1} to {last + 1}"
