"""Texts that a model writes for tasks, always with the most likely token, several sequences at a time.

Prompts are read one by one, then all sequences of a batch go on together, one token each. Sequences that have ended stay in the
batch as long as one before and one after them has not: llama.cpp computes neighbours only as one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from imatrix_runner.engines.task_jobs import TaskOutcome
from imatrix_runner.engines.worker.batching import LEAST_SEQUENCES, groups
from imatrix_runner.engines.worker.generate.answer_job import read_prompt
from imatrix_runner.engines.worker.library import Library
from imatrix_runner.engines.worker.llama_context import LlamaContext
from imatrix_runner.engines.worker.refusal import Refusal
from imatrix_runner.engines.worker.tokens import Tokens, token_bytes

_LONGEST = 1 << 20
"""Most bytes of a text: an untrusted vocabulary may have tokens of any length."""


@dataclass(frozen=True)
class Written:
    """A prompt int32 [n] of request number ``request``, and where what follows it ends."""

    request: int
    tokens: Tokens
    until: tuple[str, ...]
    n_predict: int
    dropped: int


@dataclass(frozen=True)
class WritingBatch:
    """Prompts ``members`` (numbers, at most ``sequences``), continued together in contexts of ``n_ctx`` tokens each."""

    n_ctx: int
    sequences: int
    members: tuple[int, ...]


@dataclass
class _Text:
    """What one sequence has written."""

    until: tuple[bytes, ...]
    data: bytearray = field(default_factory=bytearray)
    n_tokens: int = 0
    ended: bool = False

    def add(self, piece: bytes) -> None:
        """Append a token's text, up to the first text that ends it."""
        longest = max(map(len, self.until), default=0)
        looked = max(0, len(self.data) - longest)
        self.data += piece
        self.n_tokens += 1
        places = [place for text in self.until if (place := self.data.find(text, looked)) >= 0]
        if places or len(self.data) > _LONGEST:
            del self.data[min(places, default=_LONGEST) :]
            self.ended = True


def writing_batches(sizes: Sequence[tuple[int, int]]) -> list[WritingBatch]:
    """Batches of prompts, ``sizes``: tokens of each, and of its longest answer. Answers of one limit share a batch."""
    batches = []
    for limit in sorted({n_predict for _, n_predict in sizes}):
        numbers = [number for number, (_, n_predict) in enumerate(sizes) if n_predict == limit]
        for group in groups([sizes[number][0] + limit for number in numbers]):
            batches.append(WritingBatch(group.n_ctx, group.sequences, tuple(numbers[at] for at in group.members)))
    return batches


def _neighbours(going: Sequence[int], high: int) -> tuple[int, int]:
    """The range of sequences to go on with, within the last one, which ended at ``high``: one that was left out once has a gap.
    At least two: the result of a single one would depend on the number of threads."""
    first, end = going[0], going[-1] + 1
    if end - first >= LEAST_SEQUENCES:
        return first, end
    return (first, end + 1) if end < high else (first - 1, end)


def write_batch(
    library: Library,
    vocab: Any,
    context: LlamaContext,
    batch: WritingBatch,
    prompts: Sequence[Written],
    not_a_number: Callable[[int], Refusal],
) -> list[TaskOutcome]:
    """Continue the prompts of a batch. ``not_a_number``: the error for a request whose logits are NaN or infinite."""
    llama = library.llama
    members = [prompts[number] for number in batch.members]
    context.forget()
    filler = [members[0].tokens[:1]] * max(0, LEAST_SEQUENCES - len(members))
    rows = [*(each.tokens for each in members), *filler]
    for sequence, tokens in enumerate(rows):
        read_prompt(context, sequence, tokens[:-1])
    latest = np.array([tokens[-1] for tokens in rows], np.int32)
    ends = np.array([len(tokens) - 1 for tokens in rows], np.int32)
    texts = [_Text(tuple(text.encode() for text in each.until if text)) for each in members]
    high = len(rows)
    for step in range(members[0].n_predict):
        going = [sequence for sequence, text in enumerate(texts) if not text.ended]
        if not going:
            break
        low, high = _neighbours(going, high)
        fed = np.arange(low, high)
        context.feed(latest[fed], ends[fed] + np.int32(step), fed, np.ones(len(fed), np.bool_))
        logits = context.logits(len(fed))
        best = logits.argmax(axis=1)  # the first of equals
        for sequence in going:
            token = int(best[sequence - low])
            if not np.isfinite(logits[sequence - low, token]):
                raise not_a_number(members[sequence].request)
            latest[sequence] = token
            if llama.llama_vocab_is_eog(vocab, token):
                texts[sequence].ended = True
            else:
                texts[sequence].add(token_bytes(library, vocab, token, special=False))
    return [
        TaskOutcome(each.request, 0.0, True, text.data.decode("utf-8", "replace"), text.n_tokens, text.ended, each.dropped)
        for each, text in zip(members, texts, strict=True)
    ]
