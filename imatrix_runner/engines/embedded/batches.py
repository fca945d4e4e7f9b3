"""How llama-imatrix feeds chunks to llama.cpp, one graph at a time. Pure.

Several chunks are computed side by side as sequences of one batch; llama.cpp cuts a batch into physical batches that take
equally many tokens of every sequence (``llama_batch_allocr::split_equal``). We hand it those pieces one by one: the same
graphs, in the same order, but the buffer for logits holds one piece instead of a whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from imatrix_runner.engines.base import CollectOptions


@dataclass(frozen=True)
class Slice:
    """Tokens ``begin`` .. ``end - 1`` of each of ``n_seq`` chunks."""

    n_seq: int
    begin: int
    end: int

    @property
    def n_tokens(self) -> int:
        return self.n_seq * (self.end - self.begin)


def batches(first: int, count: int, options: CollectOptions) -> Iterator[range]:
    """The chunks ``first`` .. ``first + count - 1`` as they are computed side by side."""
    for begin in range(first, first + count, options.chunks_at_once):
        yield range(begin, min(begin + options.chunks_at_once, first + count))


def slices(n_seq: int, options: CollectOptions) -> Iterator[Slice]:
    """A batch of ``n_seq`` chunks, graph by graph."""
    at_once = max(1, options.n_ubatch // n_seq)
    for start in range(0, options.n_ctx, options.n_batch):
        stop = min(start + options.n_batch, options.n_ctx)
        for begin in range(start, stop, at_once):
            yield Slice(n_seq, begin, min(begin + at_once, stop))


def largest(options: CollectOptions) -> int:
    """The most tokens of a slice."""
    return max(piece.n_tokens for n_seq in range(1, options.chunks_at_once + 1) for piece in slices(n_seq, options))
