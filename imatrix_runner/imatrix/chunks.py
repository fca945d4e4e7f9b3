"""Which chunks are computed, in which ranges and in which order, and how many of their tokens llama.cpp's batches count.

Pure: everything follows from the text's tokens, the model and the options, never from a clock, so that the same command
always goes through the same ranges.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.errors import InvalidDataError, UsageError

# Rough costs of starting, reading and saving, and rough speeds of machines. They only decide the size of ranges, which must be
# the same in every run and so cannot be measured.
_START_SECONDS = 0.3
_LOAD_BYTES_PER_SECOND = 1.5e9
_SAVE_SECONDS = 0.02
_SAVE_BYTES_PER_SECOND = 1.5e8
"""Of the float32 matrix: its float64 range is written once and read twice, the checkpoint likewise."""
_CPU_FLOPS = 2e11
_GPU_FLOPS = 2e13
RELOAD_SHARE = 0.03
_SAVE_SHARE = 0.02
_LEAST_RANGE = 10
"""llama-imatrix's own --output-frequency."""
_FEWEST_WATCHED, _MOST_WATCHED = 16, 64
"""The number of ranges where a decision follows each. Few long ranges hold one topic each, which makes a poor sample and a
noisy curve (scripts/bench convergence: 0.05 was reached after 420 chunks with 16 ranges, after 180 with ranges of a batch)."""

_LEAST_ROWS = 16
"""llama-imatrix ignores a multiplication of fewer rows (tools/imatrix/imatrix.cpp, ``src1->ne[1] < 16``)."""


@dataclass(frozen=True)
class ChunkPlan:
    """The ranges in the order they are computed. The first ``n_asked`` are what was asked for; the rest of the text is for a
    collection that continues until every expert was reached. ``snapshots``: after how many chunks a complete file is
    written."""

    ranges: tuple[ChunkRange, ...]
    n_asked: int
    snapshots: tuple[int, ...]
    n_tokens: int

    @property
    def n_chunks(self) -> int:
        """Chunks asked for."""
        return count_chunks(self.ranges[: self.n_asked])


def count_chunks(ranges: Sequence[ChunkRange]) -> int:
    return sum(chunks.count for chunks in ranges)


def describe_ranges(ranges: Sequence[ChunkRange]) -> str:
    """``0-12,12-24``"""
    return ",".join(f"{chunks.first}-{chunks.end}" for chunks in ranges)


def range_chunks(
    n_params: int,
    to_load: int | None,
    matrix_bytes: int,
    options: CollectOptions,
    *,
    gpu: bool,
    least: int = _LEAST_RANGE,
) -> int:
    """How many chunks a range should have, in whole batches.

    So that the overhead of a range is a small part of computing it: loading the model (``to_load`` bytes; 3 %), or where
    that is not necessary (None) saving ``matrix_bytes`` (2 %), but never less than ``least``: llama-imatrix's 10.
    ``n_params`` are those active per token.
    """
    chunk = 2 * n_params * options.n_ctx / (_GPU_FLOPS if gpu else _CPU_FLOPS)
    if to_load is None:
        cheap = saving_seconds(matrix_bytes) / _SAVE_SHARE / chunk
    else:
        cheap = (_START_SECONDS + to_load / _LOAD_BYTES_PER_SECOND) / RELOAD_SHARE / chunk
    return whole_batches(math.ceil(max(least, cheap)), options)


def saving_seconds(matrix_bytes: int) -> float:
    """Return about how long it takes to check a range's sums, to add them and to write the checkpoint."""
    return _SAVE_SECONDS + matrix_bytes / _SAVE_BYTES_PER_SECOND


def watched_chunks(cheap: int, n_tokens: int, options: CollectOptions) -> int:
    """Return the size of ranges where a decision follows each: ``cheap`` chunks, but such that a text has 16 to 64 ranges (or
    as many as it has batches)."""
    in_text = n_tokens // options.n_ctx
    size = min(max(cheap, in_text // _MOST_WATCHED), max(1, in_text // _FEWEST_WATCHED))
    return whole_batches(size, options)


def whole_batches(chunks: int, options: CollectOptions) -> int:
    """Return ``chunks`` rounded up to whole batches: llama.cpp's kernels round a cut batch differently."""
    return math.ceil(chunks / options.chunks_at_once) * options.chunks_at_once


def plan_chunks(
    n_tokens: int,
    options: CollectOptions,
    *,
    first: int = 0,
    limit: int | None = None,
    range_size: int,
    save_frequency: int = 0,
    spread: bool = False,
    beyond: bool = False,
) -> ChunkPlan:
    """Cut the text into ranges of whole batches.

    ``first`` chunks are skipped, at most ``limit`` are computed; ``beyond`` plans the rest of the text too. ``spread`` orders
    the ranges such that the finished ones are always scattered over the whole text. llama-imatrix starts at chunk K > 0 only if
    ``(K + 2) * n_ctx < n_tokens``, so the tail joins the range before it. Raises :class:`InvalidDataError` if the text is too
    short.
    """
    n_ctx = options.n_ctx
    in_text = n_tokens // n_ctx

    def can_start(chunk: int) -> bool:
        return chunk == 0 or (chunk + 2) * n_ctx < n_tokens

    if in_text < 2 or not can_start(first):
        skipped = f", of which {first} are to be skipped" if first else ""
        raise InvalidDataError(
            "The calibration text is too short",
            f"it has {n_tokens} tokens, {in_text} chunks of {n_ctx}{skipped}; at least 2 must remain",
            "Give a longer text with -f, a smaller context with -c, or a smaller --chunk.",
        )
    available = in_text - first
    count = available if limit is None else min(limit, available)
    size = whole_batches(range_size, options)
    snapshots = _snapshot_marks(save_frequency, available if beyond else count, options)
    marks = {*range(0, count, size), *(() if spread else (mark for mark in snapshots if mark < count))}
    asked = _between(first, sorted(mark for mark in marks if can_start(first + mark)), count)
    rest: list[ChunkRange] = []
    if beyond and count < available and can_start(first + count):
        marks = {*range(count, available, size), *(() if spread else (mark for mark in snapshots if mark > count))}
        rest = _between(first, sorted(mark for mark in marks if can_start(first + mark)), available)
    if spread:
        asked, rest = ([ranges[place] for place in spread_order(len(ranges))] for ranges in (asked, rest))
    ranges = (*asked, *rest)
    return ChunkPlan(ranges, len(asked), _reached(snapshots, ranges), n_tokens)


def _between(first: int, starts: Sequence[int], end: int) -> list[ChunkRange]:
    return [ChunkRange(first + begin, stop - begin) for begin, stop in zip(starts, [*starts[1:], end], strict=True)]


def _snapshot_marks(frequency: int, count: int, options: CollectOptions) -> list[int]:
    return [whole_batches(mark, options) for mark in range(frequency, count, frequency)] if frequency else []


def _reached(marks: Sequence[int], ranges: Sequence[ChunkRange]) -> tuple[int, ...]:
    """Return how many chunks are done at the first end of a range at or after each mark; the end of the last range is left
    out."""
    done, ends = 0, list[int]()
    for chunks in ranges[:-1]:
        done += chunks.count
        ends.append(done)
    reached = (next((end for end in ends if end >= mark), None) for mark in marks)
    return tuple(dict.fromkeys(end for end in reached if end is not None))


def spread_order(count: int) -> list[int]:
    """``0 .. count - 1`` in van der Corput order (bits reversed): 0, 4, 2, 6, 1, 5, 3, 7 for eight.

    Wherever a collection stops, the visited ranges are spread evenly over the text: calibration texts are often sorted by
    topic, so their beginning alone is not a representative sample.
    """
    bits = max(0, count - 1).bit_length()
    turned = (sum(((place >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)) for place in range(1 << bits))
    return [place for place in turned if place < count]


def require_rows(options: CollectOptions, *, recurrent: bool = False) -> None:
    """Raise :class:`UsageError` for batches so small that llama.cpp's collector skips all their multiplications.

    ``recurrent``: the model has layers that compute each sequence separately.
    """
    by_rows, by_sequence, _ = _counts(options.chunks_at_once, options)
    if not by_rows:
        raise UsageError(
            f"Nothing can be collected with -b {options.n_batch} -ub {options.n_ubatch}",
            f"llama.cpp ignores multiplications of fewer than {_LEAST_ROWS} rows, and no batch would have more",
            f"Use at least {_LEAST_ROWS} for both; the defaults are -b 2048 -ub 512.",
        )
    if recurrent and not by_sequence:
        at_once = max(1, options.n_ubatch // _LEAST_ROWS)
        raise UsageError(
            f"Nothing can be collected from recurrent layers with -c {options.n_ctx} -b {options.n_batch}",
            f"they compute each of the {options.chunks_at_once} chunks of a batch separately, in micro-batches of fewer than "
            f"{_LEAST_ROWS} tokens, which llama.cpp ignores",
            f"Compute fewer chunks at once with -b {options.n_ctx * at_once}, or use a larger -c.",
        )


def counted_tokens(n_chunks: int, options: CollectOptions) -> frozenset[int]:
    """The numbers of tokens that llama-imatrix may count for a weight that every token of ``n_chunks`` chunks is multiplied by.

    Some tokens are not counted: a batch of several chunks is computed in micro-batches of as many tokens of each chunk as fit
    (src/llama-batch.cpp, ``split_equal``), and the last micro-batch may have under 16 rows, which the collector skips. 7 chunks
    of 512 end with a batch of three: micro-batches of 3 x 170 tokens, and 3 x 2 = 6 tokens that are lost. Recurrent layers
    compute each sequence separately, so that 16 tokens of each are needed; older builds, and ``-kvu``, cut a batch without
    regard to its chunks and lose less. A count may also be a whole multiple of these: a weight used twice in a graph counts
    twice.
    """
    return frozenset(_counts(n_chunks, options)) - {0}


def _counts(n_chunks: int, options: CollectOptions) -> tuple[int, int, int]:
    """Return the tokens counted where the rows of all sequences are multiplied together, where each sequence is separate, and
    where a batch is cut without regard to sequences."""
    batches = [options.chunks_at_once] * (n_chunks // options.chunks_at_once)
    batches += [n_chunks % options.chunks_at_once] if n_chunks % options.chunks_at_once else []
    n_batch = min(options.n_batch, options.chunks_at_once * options.n_ctx)
    n_ubatch = min(options.n_ubatch, n_batch)
    by_rows = by_sequence = simple = 0
    for n_seq in batches:
        for begin in range(0, options.n_ctx, n_batch):
            n_tokens = min(options.n_ctx - begin, n_batch)
            ubatches = _equal_ubatches(n_seq, n_tokens, n_ubatch)
            by_rows += sum(seqs * tokens for seqs, tokens in ubatches if seqs * tokens >= _LEAST_ROWS)
            by_sequence += sum(seqs * tokens for seqs, tokens in ubatches if tokens >= _LEAST_ROWS)
            whole, rest = divmod(n_seq * n_tokens, n_ubatch)
            simple += whole * n_ubatch * (n_ubatch >= _LEAST_ROWS) + rest * (rest >= _LEAST_ROWS)
    return by_rows, by_sequence, simple


def _equal_ubatches(n_seq: int, n_tokens: int, n_ubatch: int) -> list[tuple[int, int]]:
    """Return ``(sequences, tokens of each)`` of every micro-batch of a batch of ``n_seq`` sequences of ``n_tokens``."""
    ubatches: list[tuple[int, int]] = []
    left = [n_tokens] * n_seq
    while any(left):
        begin = next(seq for seq in range(n_seq) if left[seq])
        # Neighbours only, and llama.cpp stops one sequence after the micro-batch is full.
        seqs = next((seq for seq in range(begin, n_seq) if not left[seq]), n_seq) - begin
        seqs = min(seqs, n_ubatch + 1)
        tokens = min(max(1, n_ubatch // seqs), *left[begin : begin + seqs])
        ubatches.append((seqs, tokens))
        for seq in range(begin, begin + seqs):
            left[seq] -= tokens
    return ubatches
