"""Imatrix data that stays on disk until it is looked at, one entry at a time: a mixture's matrix can be a gigabyte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from imatrix_runner.engines.files.imatrix_file import StoredEntry
from imatrix_runner.imatrix.matrix import Counts, Entries, MatrixEntry


class StoredEntries(Entries):
    """Entries by name, sorted; each look-up reads its sums from the file. ``counts``: the counts of each, read already."""

    def __init__(self, stored: Mapping[str, StoredEntry], counts: Mapping[str, Counts]) -> None:
        self._stored = {name: stored[name] for name in sorted(stored)}
        self._counts = counts

    def __getitem__(self, name: str) -> MatrixEntry:
        with np.errstate(invalid="ignore"):  # of a signalling NaN, which checks of the values report
            return MatrixEntry(self._stored[name].sums().astype(np.float64, copy=False), self._counts[name])

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, int]:
        """``(n_mat, n_columns)`` without reading."""
        entry = self._stored[name]
        return entry.n_mat, entry.n_columns

    def counts(self, name: str) -> Counts:
        return self._counts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
