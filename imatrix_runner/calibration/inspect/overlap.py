"""Overlap of a held-out text with a calibration text. Levels look better than they are on text from the calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from imatrix_runner.calibration.shingles import I64, U64, overlap_shingles
from imatrix_runner.documents.blocks import TextBlock, Whole, parts, read_blocks
from imatrix_runner.safe_text import printable

Verdict = Literal["none", "some", "void"]

VOID, SOME = 0.2, 0.01
"""Shares from which measurements are void (they show how well the calibration text fits) or slightly too good. Set phrases,
quotations and licence headers that any two texts share stay below a hundredth."""

_MOST = 1 << 21
"""Upper bound for the shingles kept of the held-out text (about 12 MB of English); a longer text is sampled evenly by hash."""
_BLOCK = 1 << 18
_EXAMPLE = 160


@dataclass(frozen=True)
class Overlap:
    """``share``: fraction of the held-out text's shingles (sequences of 13 words, or 40 characters in scripts without spaces)
    that occur in the calibration text, ignoring case and punctuation. ``n_shingles``: their number; 0 if the text is too short
    to compare. ``longest``: length in characters of the longest common passage; ``example``: its beginning, safe to print on a
    terminal. ``n_compared`` is less than ``n_shingles`` if the share is estimated from a sample. ``identical``: equal bytes."""

    share: float
    n_shingles: int
    longest: int
    example: str
    n_compared: int
    identical: bool = False


def verdict(overlap: Overlap) -> Verdict:
    """``void`` from a share of 0.2 on (and for identical texts), ``some`` from 0.01 on, else ``none``."""
    if overlap.identical or overlap.share >= VOID:
        return "void"
    return "some" if overlap.share >= SOME else "none"


def overlap(calibration: str, held_out: str) -> Overlap:
    """Compare two texts; additional memory is bounded."""
    index = _Index(parts(held_out, _BLOCK))
    index.look_up(parts(calibration, _BLOCK))
    start, end = index.longest()
    return index.overlap(held_out[start : min(end, start + _EXAMPLE)], identical=calibration == held_out)


def overlap_files(calibration: Path, held_out: Path, on_bytes: Callable[[int], None] | None = None) -> Overlap:
    """Compare two text files of up to 1 GiB, each read in blocks.

    ``on_bytes`` is called with the number of bytes of the calibration text read so far. Raises :class:`InvalidDataError` for a
    file that is not text.
    """
    whole_calibration, whole_held_out = Whole(), Whole()
    index = _Index(block.text for block in _held_out(held_out, whole_held_out))
    index.look_up(block.text for block in read_blocks(calibration, whole_calibration, on_bytes=on_bytes))
    start, end = index.longest()
    example = _excerpt((block.text for block in _held_out(held_out)), start, min(end, start + _EXAMPLE))
    return index.overlap(example, identical=whole_calibration.sha256 == whole_held_out.sha256)


def _held_out(path: Path, whole: Whole | None = None) -> Iterator[TextBlock]:
    return read_blocks(path, whole, role="held-out text")


class _Index:
    """The held-out text's shingles, and which of them occur in the calibration text."""

    def __init__(self, held_out: Iterable[str]) -> None:
        self.n_shingles = 0
        self._every = 1  # a power of two: only its multiples are kept
        hashes, starts, ends = (np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
        waiting: list[tuple[U64, I64, I64]] = []
        for found in overlap_shingles(held_out):
            self.n_shingles += len(found.hashes)
            kept = self._kept(found.hashes)
            waiting.append((found.hashes[kept], found.starts[kept], found.ends[kept]))
            while len(hashes) + sum(len(each[0]) for each in waiting) > _MOST:
                hashes, starts, ends = _joined([(hashes, starts, ends), *waiting])
                self._every, waiting = 2 * self._every, []
                kept = self._kept(hashes)
                hashes, starts, ends = hashes[kept], starts[kept], ends[kept]
        hashes, self._starts, self._ends = _joined([(hashes, starts, ends), *waiting])
        self._distinct, self._place = np.unique(hashes, return_inverse=True)
        self._met = np.zeros(len(self._distinct), np.bool_)

    def _kept(self, hashes: U64) -> npt.NDArray[np.bool_]:
        kept: npt.NDArray[np.bool_] = (hashes & np.uint64(self._every - 1)) == 0
        return kept

    def look_up(self, calibration: Iterable[str]) -> None:
        for found in overlap_shingles(calibration):
            hashes = found.hashes[self._kept(found.hashes)]
            if len(self._distinct) and len(hashes):
                at = np.minimum(np.searchsorted(self._distinct, hashes), len(self._distinct) - 1)
                self._met[at[self._distinct[at] == hashes]] = True

    @property
    def _common(self) -> npt.NDArray[np.bool_]:
        """For each kept shingle, in order, whether it occurs in the calibration text."""
        return self._met[self._place]

    def longest(self) -> tuple[int, int]:
        """Start and end, in characters, of the longest common passage: consecutive shingles that all occur in both texts."""
        edges = np.flatnonzero(np.diff(np.concatenate(([0], self._common.astype(np.int8), [0]))))
        if not len(edges):
            return 0, 0
        starts, ends = self._starts[edges[::2]], self._ends[edges[1::2] - 1]
        best = int(np.argmax(ends - starts))
        return int(starts[best]), int(ends[best])

    def overlap(self, example: str, *, identical: bool) -> Overlap:
        start, end = self.longest()
        common = self._common
        share = float(common.mean()) if len(common) else 0.0
        shown = printable(" ".join(example.split())) + ("…" if end - start > len(example) else "")
        return Overlap(share, self.n_shingles, end - start, shown, len(common), identical)


def _joined(found: list[tuple[U64, I64, I64]]) -> tuple[U64, I64, I64]:
    hashes, starts, ends = zip(*found, strict=True)
    return np.concatenate(hashes), np.concatenate(starts), np.concatenate(ends)


def _excerpt(blocks: Iterable[str], start: int, end: int) -> str:
    """The characters from ``start`` to ``end`` of a text that comes in blocks."""
    found, read = "", 0
    for text in blocks:
        if start == end or read >= end:
            break
        found += text[max(0, start - read) : max(0, end - read)]
        read += len(text)
    return found
