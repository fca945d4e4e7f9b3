"""How a measurement fits on the disk: which chunks a reference holds at a time, and which twins are there at once. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from imatrix_runner.engines.base import ChunkRange
from imatrix_runner.engines.embedded.scored import scored_bytes
from imatrix_runner.engines.logits_file import LogitsHead, scored_tokens
from imatrix_runner.errors import NoSpaceError
from imatrix_runner.files import human_bytes

DEFAULT_BYTES = 8 << 30
"""What a measurement takes at most where nobody says otherwise: llama-perplexity's own files are said to take 10 GB."""
_NOTE_BYTES = 4096
"""More than what is written beside a reference about what it is of."""
_FREE_SHARE = 0.8


@dataclass(frozen=True)
class Extent:
    """What is measured: ``n_chunks`` of ``n_ctx`` tokens of a vocabulary of ``n_vocab``, ``at_once`` chunks side by side,
    for ``n_levels`` levels. ``given``: the reference is somebody's file, and takes nothing more. ``further_bytes``: of what
    else lies there meanwhile, a copy of the text."""

    n_vocab: int
    n_ctx: int
    n_chunks: int
    at_once: int
    n_levels: int
    given: bool = False
    further_bytes: int = 0

    @property
    def n_tokens(self) -> int:
        """Scored ones."""
        return self.n_chunks * scored_tokens(self.n_ctx)

    @property
    def kept_bytes(self) -> int:
        """The scored tokens of all levels and of the source, which stay."""
        return (self.n_levels + 1) * scored_bytes(self.n_chunks, self.n_ctx)

    def reference_bytes(self, n_chunks: int) -> int:
        return 0 if self.given else LogitsHead(self.n_ctx, self.n_vocab, n_chunks).n_bytes + _NOTE_BYTES


@dataclass(frozen=True)
class Fit:
    """``chunks`` of the reference at a time, all in ``n_passes`` passes of the source; ``n_bytes`` at most on the disk at once.
    ``room``: what twins may take of it together."""

    chunks: int
    n_passes: int
    n_bytes: int
    room: int


def disk_limit(asked: int | None, free: int) -> int:
    """What may be used: as asked for, else :data:`DEFAULT_BYTES`, but never the last fifth of what is free."""
    return min(DEFAULT_BYTES if asked is None else asked, int(_FREE_SHARE * free))


def fit(extent: Extent, limit: int, twins: Sequence[int] = (), *, whole: bool = False) -> Fit:
    """``twins``: bytes of files that exist only while they are measured; room is left for the largest. ``whole``: the engine
    cannot go on in a second pass, so that there are fewer chunks instead.

    A pass holds whole batches: which chunks are computed side by side, and so every bit, does not depend on the disk.
    Raises :class:`NoSpaceError` when not even one batch fits.
    """
    largest = max(twins, default=0)
    kept = extent.kept_bytes + extent.further_bytes
    beside = kept + largest
    least = 1 if whole else min(extent.at_once, extent.n_chunks)
    if beside + extent.reference_bytes(least) > limit:
        twin = f", with the largest twin of {human_bytes(largest)}" if largest else ""
        raise NoSpaceError(
            "There is no room to measure",
            f"{least} chunks of {extent.n_ctx} tokens take {human_bytes(beside + extent.reference_bytes(least))}{twin}, "
            f"and {human_bytes(max(0, limit))} may be used",
            "Free some space or raise --max-disk; a smaller -c takes less too.",
        )
    chunks = extent.n_chunks
    over = beside + extent.reference_bytes(chunks) - limit
    if over > 0:
        each = extent.reference_bytes(1) - extent.reference_bytes(0)
        chunks = (chunks - -(-over // each)) // least * least
    reference = extent.reference_bytes(chunks)
    room = limit - kept - reference
    passes = 1 if whole else -(-extent.n_chunks // chunks)
    return Fit(chunks, passes, kept + reference + min(room, sum(twins)), room)


def next_range(done: Sequence[int], extent: Extent, at_a_time: int) -> ChunkRange | None:
    """The chunks that the next reference holds, ``done`` being how many chunks each level was compared with; None: all done."""
    first = min(done, default=extent.n_chunks) // extent.at_once * extent.at_once
    if min(done, default=extent.n_chunks) >= extent.n_chunks:
        return None
    return ChunkRange(first, min(at_a_time, extent.n_chunks - first))


def waves(sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Twins that are there at the same time: as many as fit into ``room``, and at least one."""
    found: list[list[str]] = []
    left = 0
    for name, size in sizes.items():
        if not found or size > left:
            found.append([])
            left = room
        found[-1].append(name)
        left -= size
    return found
