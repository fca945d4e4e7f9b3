"""Fits a measurement on the disk: the chunks of each reference window, and the baselines that exist at the same time. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imatrix_runner.engines.files.logits import LogitsHead, scored_tokens
from imatrix_runner.engines.files.token_scores import token_scores_bytes
from imatrix_runner.engines.jobs import ChunkRange
from imatrix_runner.errors import NoSpaceError
from imatrix_runner.files import human_bytes

DEFAULT_BYTES = 8 << 30
"""Default bound of a measurement's disk space. llama.cpp's documentation speaks of 10 GB for llama-perplexity's files."""
_NOTE_BYTES = 4096
"""Upper bound, in bytes, for the fingerprint file stored next to a reference logits file."""
_FREE_SHARE = 0.8


@dataclass(frozen=True)
class Extent:
    """What is measured: ``n_chunks`` of ``n_ctx`` tokens of a vocabulary of ``n_vocab``, ``at_once`` chunks side by side,
    for ``n_levels`` levels. ``given``: the reference is a file of the user's and takes no further space. ``further_bytes``:
    size of other files that exist meanwhile, such as a copy of the text."""

    n_vocab: int
    n_ctx: int
    n_chunks: int
    at_once: int
    n_levels: int
    given: bool = False
    further_bytes: int = 0

    @property
    def n_tokens(self) -> int:
        """Number of scored tokens."""
        return self.n_chunks * scored_tokens(self.n_ctx)

    @property
    def kept_bytes(self) -> int:
        """Size of the token scores of all levels and of the source, which are kept."""
        return (self.n_levels + 1) * token_scores_bytes(self.n_chunks, self.n_ctx)

    def reference_bytes(self, n_chunks: int) -> int:
        return 0 if self.given else LogitsHead(self.n_ctx, self.n_vocab, n_chunks).n_bytes + _NOTE_BYTES


@dataclass(frozen=True)
class DiskFit:
    """``chunks`` in each of ``n_passes`` reference windows; ``n_bytes``: the most that is on the disk at once; ``room``: what
    of it baselines may take together."""

    chunks: int
    n_passes: int
    n_bytes: int
    room: int


def disk_limit(asked: int | None, free: int) -> int:
    """Bytes that may be used: those asked for, else :data:`DEFAULT_BYTES`, but never the last fifth of the free space."""
    return min(DEFAULT_BYTES if asked is None else asked, int(_FREE_SHARE * free))


def fit(extent: Extent, limit: int, baselines: Sequence[int] = (), *, whole: bool = False) -> DiskFit:
    """Return the reference windows that fit. ``baselines``: sizes of files that exist only while they are measured; room is
    left for the largest. ``whole``: the engine cannot continue in a second window, so fewer chunks are measured instead.

    A window holds whole batches: which chunks are computed together, and so every bit, does not depend on the disk.
    Raises :class:`NoSpaceError` when not even one batch fits.
    """
    largest = max(baselines, default=0)
    kept = extent.kept_bytes + extent.further_bytes
    needed = kept + largest
    least = 1 if whole else min(extent.at_once, extent.n_chunks)
    if needed + extent.reference_bytes(least) > limit:
        baseline = f", with the largest baseline of {human_bytes(largest)}" if largest else ""
        raise NoSpaceError(
            "There is no room to measure",
            f"{least} chunks of {extent.n_ctx} tokens take {human_bytes(needed + extent.reference_bytes(least))}{baseline}, "
            f"and {human_bytes(max(0, limit))} may be used",
            "Free some space or raise --max-disk; a smaller -c takes less too.",
        )
    chunks = extent.n_chunks
    over = needed + extent.reference_bytes(chunks) - limit
    if over > 0:
        each = extent.reference_bytes(1) - extent.reference_bytes(0)
        chunks = (chunks - -(-over // each)) // least * least
    reference = extent.reference_bytes(chunks)
    room = limit - kept - reference
    passes = 1 if whole else -(-extent.n_chunks // chunks)
    return DiskFit(chunks, passes, kept + reference + min(room, sum(baselines)), room)


def next_range(done: Sequence[int], extent: Extent, at_a_time: int) -> ChunkRange | None:
    """The chunks of the next reference window; ``done``: how many chunks each level was compared with. None if all are done."""
    first = min(done, default=extent.n_chunks) // extent.at_once * extent.at_once
    if min(done, default=extent.n_chunks) >= extent.n_chunks:
        return None
    return ChunkRange(first, min(at_a_time, extent.n_chunks - first))


def waves(sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Group baselines that exist at the same time: as many as fit into ``room``, and at least one."""
    found: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not found or size > left:
            found.append([])
            left = room
        found[-1].append(name)
        left -= size
    return found
