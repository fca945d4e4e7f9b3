"""What a model reads for requests of tasks, as token ids, and the batches in which it reads it. Pure.

The borders between context and continuation are those of lm-evaluation-harness's own adapter for transformers
(``models/huggingface.py``, ``_encode_pair``; ``utils.py``, ``get_rolling_token_windows``), so that figures can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from imatrix_runner.engines.worker.batching import MOST_SEQUENCES, context_size, most_sequences
from imatrix_runner.engines.worker.tokens import Tokens

Encode = Callable[[str, bool], Tokens]
"""Tokens of a text; True: with those that the vocabulary adds at its beginning."""

LEAST_TOKENS = 2
"""A single token of a single sequence is the one shape whose result depends on the number of threads."""


@dataclass(frozen=True)
class ReadTarget:
    """Tokens whose probability is wanted, int32 [n]: part ``part`` of ``parts`` of a request. ``dropped``: tokens that the
    model's context had no room for."""

    request: int
    tokens: Tokens
    part: int = 0
    parts: int = 1
    dropped: int = 0


@dataclass(frozen=True)
class Reading:
    """An input int32 [n], the first of its places whose prediction is wanted, and the targets that are scored from there:
    choices of one token share their context's reading."""

    tokens: Tokens
    first: int
    targets: list[ReadTarget] = field(default_factory=list)


@dataclass(frozen=True)
class ReadingBatch:
    """Readings ``members`` (numbers), computed together in contexts of ``n_ctx`` tokens, padded to ``length``."""

    n_ctx: int
    sequences: int
    length: int
    members: tuple[int, ...]


def scored_pair(context: str, continuation: str, encode: Encode, prefix: int) -> tuple[Tokens, Tokens]:
    """The tokens of both; ``prefix``: what a text begins with that has no context."""
    if not context:
        return np.array([prefix], np.int32), encode(continuation, False)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, start = encode(context + continuation, True), len(encode(context, True)) or 1
    start = min(start, len(whole) - 1)  # a token may reach over the border
    if start < 1:
        return np.array([prefix], np.int32), whole
    return whole[:start], whole[start:]


def cut_pair(request: int, context: Tokens, continuation: Tokens, most: int) -> Reading:
    """The reading of a pair of token rows in a model with a context of ``most`` tokens; what is too long is cut on the left."""
    whole = np.concatenate([context, continuation])
    kept = whole[-(most + 1) :]
    wanted = min(len(continuation), len(kept) - 1)
    read = kept[:-1]
    return Reading(read, len(read) - wanted, [ReadTarget(request, kept[len(kept) - wanted :], dropped=len(whole) - len(kept))])


def rolling_readings(request: int, tokens: Tokens, prefix: int, most: int) -> list[Reading]:
    """A whole text, each token predicted once with as much context as there is room for."""
    whole = np.concatenate([np.array([prefix], np.int32), tokens])
    ends = [*range(min(most, len(tokens)), len(tokens), most), len(tokens)]
    readings, done = [], 0
    for part, end in enumerate(ends):
        # whole[i] predicts tokens[i]
        begin = 0 if part == 0 else end - most
        readings.append(
            Reading(whole[begin : max(end, 1)], done - begin, [ReadTarget(request, tokens[done:end], part, len(ends))])
        )
        done = end
    return readings


def shared(readings: Sequence[Reading]) -> list[Reading]:
    """The readings, each distinct one once, with all of its targets; in order of length."""
    distinct: dict[tuple[bytes, int], Reading] = {}
    for reading in readings:
        key = reading.tokens.tobytes(), reading.first
        distinct.setdefault(key, Reading(reading.tokens, reading.first)).targets.extend(reading.targets)
    return sorted(distinct.values(), key=lambda each: len(each.tokens))


def reading_batches(lengths: Sequence[int], n_ubatch: int) -> list[ReadingBatch]:
    """The batches of readings with these ``lengths``, which ascend. As many are padded to the same length as fit into one
    micro-batch of ``n_ubatch`` tokens; a longer one is read alone. What is read together follows from the lengths alone."""
    return list(_batches(lengths, n_ubatch))


def _batches(lengths: Sequence[int], n_ubatch: int) -> Iterator[ReadingBatch]:
    begin = 0
    while begin < len(lengths):
        end = begin + 1
        while end < len(lengths) and _fits(lengths[end], end + 1 - begin, n_ubatch):
            end += 1
        length = max(LEAST_TOKENS, lengths[end - 1])
        n_ctx = context_size(length)
        yield ReadingBatch(n_ctx, most_sequences(n_ctx), length, tuple(range(begin, end)))
        begin = end


def _fits(length: int, count: int, n_ubatch: int) -> bool:
    length = max(LEAST_TOKENS, length)
    return count <= min(MOST_SEQUENCES, most_sequences(context_size(length))) and count * length <= n_ubatch
