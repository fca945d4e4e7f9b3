"""Which tensors of a level go into which shard, by the rules of llama-gguf-split.

Source: ``split_strategy`` in tools/gguf-split/gguf-split.cpp. Headers are not counted: a shard may be larger than the limit by
its header.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.models.gguf_file import padded

T = TypeVar("T")

MEGABYTE = 1000 * 1000
"""What ``M`` means for llama-gguf-split, in bytes; ``G`` is 1000 of them."""

MOST_SHARDS = 65535
"""The number of shards is stored in 16 bits."""

_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT


def tensors_per_shard(sizes: Iterable[int], options: QuantizeOptions) -> tuple[int, ...]:
    """Return the number of tensors in each shard, in order.

    ``sizes``: bytes of each tensor of the level, in its order. A tensor that is larger than the limit gets a shard of its own;
    if it is the first one, the first shard stays without any, which llama-gguf-split refuses.
    """
    limit = options.split_max_size * MEGABYTE if options.split_max_size is not None else None
    counts, held = [0], 0
    for index, size in enumerate(sizes):
        n_bytes = padded(size, _ALIGNMENT)
        held += n_bytes
        if limit is not None:
            full = held > limit
        else:
            full = index > 0 and options.split_max_tensors is not None and index % options.split_max_tensors == 0
        if full:
            counts.append(0)
            held = n_bytes
        counts[-1] += 1
    return tuple(counts)


def shard_paths(single: Path, count: int) -> tuple[Path, ...]:
    """Return llama.cpp's names for the shards of a file, next to it: ``m-Q8_0-00001-of-00003.gguf``."""
    return tuple(single.with_name(f"{single.stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))


def cut(items: Sequence[T], counts: Sequence[int]) -> list[list[T]]:
    """Divide ``items`` into consecutive groups of these sizes."""
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [list(items[end - count : end]) for end, count in zip(ends, counts, strict=True)]
