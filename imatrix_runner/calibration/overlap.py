"""How much of a held-out text stands in a calibration text too: a quality measured on what was calibrated with is void."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from imatrix_runner.calibration.pieces import Piece, Whole, parts, read_pieces
from imatrix_runner.calibration.shingles import I64, U64, overlap_shingles
from imatrix_runner.models.bounded import printable

Verdict = Literal["none", "some", "void"]

VOID, SOME = 0.2, 0.01
"""From a fifth on, a figure measured on the held-out text says how well the calibration was remembered. Below a hundredth are
the set phrases, quotations and licence headers that any two texts share."""

_MOST = 1 << 21
"""So many stretches of the held-out text are remembered (about 12 MB of English); of a longer one an even sample by hash."""
_BLOCK = 1 << 18
_EXAMPLE = 160


@dataclass(frozen=True)
class Overlap:
    """``share`` 0..1: of the held-out text's stretches of 13 words (40 characters where no spaces are written), those that
    occur in the calibration text, whatever their case and punctuation. ``n_shingles``: how many there are; 0 is too short a
    text to tell. ``longest``: characters of the longest common passage, ``example`` its beginning, fit for a terminal.
    ``n_compared`` is less than ``n_shingles`` where the share is estimated from a sample. ``identical``: the same bytes."""

    share: float
    n_shingles: int
    longest: int
    example: str
    n_compared: int
    identical: bool = False


def verdict(overlap: Overlap) -> Verdict:
    """``void`` from a share of 0.2 on (and for the same file), ``some`` from 0.01 on."""
    if overlap.identical or overlap.share >= VOID:
        return "void"
    return "some" if overlap.share >= SOME else "none"


def overlap(calibration: str, held_out: str) -> Overlap:
    """Compare two texts; memory beyond theirs is bounded."""
    index = _Index(parts(held_out, _BLOCK))
    index.look_up(parts(calibration, _BLOCK))
    start, end = index.longest()
    return index.overlap(held_out[start : min(end, start + _EXAMPLE)], identical=calibration == held_out)


def overlap_files(calibration: Path, held_out: Path, on_bytes: Callable[[int], None] | None = None) -> Overlap:
    """Compare two text files of up to 1 GiB, each read in pieces; ``on_bytes`` hears how far the calibration text is read.

    Raises :class:`InvalidDataError` for a file that is no text.
    """
    ours, theirs = Whole(), Whole()
    index = _Index(piece.text for piece in _held_out(held_out, theirs))
    index.look_up(piece.text for piece in read_pieces(calibration, ours, on_bytes=on_bytes))
    start, end = index.longest()
    example = _excerpt((piece.text for piece in _held_out(held_out)), start, min(end, start + _EXAMPLE))
    return index.overlap(example, identical=ours.sha256 == theirs.sha256)


def _held_out(path: Path, whole: Whole | None = None) -> Iterator[Piece]:
    return read_pieces(path, whole, role="held-out text")


class _Index:
    """The held-out text's stretches, and which of them were met elsewhere."""

    def __init__(self, held_out: Iterable[str]) -> None:
        self.n_shingles = 0
        self._every = 1  # a power of two: only hashes that it divides are kept
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
        """Of each remembered stretch in its order, whether it was met."""
        return self._met[self._place]

    def longest(self) -> tuple[int, int]:
        """Characters at which the longest common passage begins and ends: consecutive stretches that were all met."""
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


def _excerpt(pieces: Iterable[str], start: int, end: int) -> str:
    """The characters from ``start`` to ``end`` of a text in pieces."""
    found, read = "", 0
    for text in pieces:
        if start == end or read >= end:
            break
        found += text[max(0, start - read) : max(0, end - read)]
        read += len(text)
    return found
