"""Batches of chunks and prompts, for chunks as llama-imatrix feeds them to llama.cpp. Pure.

Several chunks are computed in parallel as sequences of one batch; llama.cpp splits a batch into micro-batches with equally many
tokens of every sequence (``llama_batch_allocr::split_equal``). The worker passes it those micro-batches one by one: the same
graphs in the same order, but the buffer for logits holds one micro-batch instead of a whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from imatrix_runner.engines.jobs import CollectOptions


@dataclass(frozen=True)
class MicroBatch:
    """Tokens ``begin`` .. ``end - 1`` of each of ``n_seq`` chunks."""

    n_seq: int
    begin: int
    end: int

    @property
    def n_tokens(self) -> int:
        return self.n_seq * (self.end - self.begin)


def batches(first: int, count: int, options: CollectOptions) -> Iterator[range]:
    """Chunks ``first`` .. ``first + count - 1``, grouped into batches computed in parallel."""
    for begin in range(first, first + count, options.chunks_at_once):
        yield range(begin, min(begin + options.chunks_at_once, first + count))


def micro_batches(n_seq: int, options: CollectOptions) -> Iterator[MicroBatch]:
    """The micro-batches of a batch of ``n_seq`` chunks, in order; each is one graph."""
    at_once = max(1, options.n_ubatch // n_seq)
    for start in range(0, options.n_ctx, options.n_batch):
        stop = min(start + options.n_batch, options.n_ctx)
        for begin in range(start, stop, at_once):
            yield MicroBatch(n_seq, begin, min(begin + at_once, stop))


def largest(options: CollectOptions) -> int:
    """The most tokens in a micro-batch."""
    return max(ubatch.n_tokens for n_seq in range(1, options.chunks_at_once + 1) for ubatch in micro_batches(n_seq, options))


LEAST_CONTEXT = 256
"""llama.cpp pads a sequence's context to multiples of this."""

MOST_TOKENS = 8192
"""Most context tokens of all sequences together: 1 GiB of keys and values in a model like Llama-3-8B."""

MOST_SEQUENCES = 16
"""Most sequences: with more, the arithmetic of a batch takes longer than fetching the weights."""

LEAST_SEQUENCES = 2
"""Fewest sequences: a single token of a single sequence is the one shape for which ggml's attention depends on the number of
threads (ggml-cpu, ``ggml_compute_forward_flash_attn_ext_f16`` splits the keys among threads)."""


@dataclass(frozen=True)
class Group:
    """Prompts ``members`` (numbers from 0, at most ``sequences``), answered together in contexts of ``n_ctx`` tokens each."""

    n_ctx: int
    sequences: int
    members: tuple[int, ...]


def groups(sizes: Sequence[int]) -> list[Group]:
    """Group prompts by context size, small contexts first, prompts in order. ``sizes``: tokens of each prompt and its longest
    answer together."""
    by_context: dict[int, list[int]] = {}
    for number, size in enumerate(sizes):
        by_context.setdefault(context_size(size), []).append(number)
    return [
        Group(n_ctx, sequences, tuple(numbers[at : at + sequences]))
        for n_ctx, numbers in sorted(by_context.items())
        for sequences in (most_sequences(n_ctx),)
        for at in range(0, len(numbers), sequences)
    ]


def context_size(size: int) -> int:
    """The smallest of 256, 512, 1024, … that holds ``size`` tokens."""
    n_ctx = LEAST_CONTEXT
    while n_ctx < size:
        n_ctx *= 2
    return n_ctx


def most_sequences(n_ctx: int) -> int:
    """How many sequences of ``n_ctx`` tokens are computed together."""
    return max(LEAST_SEQUENCES, min(MOST_SEQUENCES, MOST_TOKENS // n_ctx))
