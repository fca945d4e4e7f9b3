"""The predictions of the model as it is, kept while its weights are changed, and the comparison of others with them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.cost_jobs import TrialResult
from imatrix_runner.engines.files.logits import Rows, row_words
from imatrix_runner.engines.worker.evaluate.logit_math import F32, I32, compare_rows, keep_rows
from imatrix_runner.files import require_space

Sums = npt.NDArray[np.float64]

_FEWEST = 4
"""Chunks before a trial may end early: the standard error over fewer is too often small by chance."""


@dataclass(frozen=True)
class KeptBlock:
    """Predictions to keep: ``rows`` as in a reference's file, and for each its divergence from the exact ones, its top token
    and -ln p of the next token. ``crc``: of the logits."""

    rows: Rows
    own: Sums
    top: npt.NDArray[np.int64]
    nll: F32
    crc: int


class ReferenceScores:
    """Predictions for chunks, in the scratch file ``path``, which is removed by :meth:`close`."""

    def __init__(self, path: Path, n_chunks: int, n_rows: int, n_vocab: int) -> None:
        self._path, self._n_rows, self._words = path, n_rows, row_words(n_vocab)
        require_space(path, 2 * n_chunks * n_rows * self._words, "the predictions that trials are compared with")
        self._file = path.open("wb")
        self._own = np.zeros((n_chunks, n_rows))
        self._top = np.zeros((n_chunks, n_rows), np.int64)
        self._nll = np.zeros((n_chunks, n_rows))
        self._crcs: dict[tuple[int, int], int] = {}

    def close(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def keep(self, logits: F32, _chunk: int, _row: int, targets: I32) -> KeptBlock:
        """Encode a block of a chunk's predictions."""
        rows, nll = keep_rows(logits, targets)
        own = compare_rows(logits, rows, targets)["kld"]
        return KeptBlock(rows, own, logits.argmax(axis=1), nll, checksum(logits))

    def take(self, chunk: int, row: int, block: KeptBlock) -> None:
        """Write a block, which begins at ``row``."""
        self._file.seek(self._offset(chunk, row))
        self._file.write(block.rows.tobytes())
        place = chunk, slice(row, row + len(block.rows))
        self._own[place], self._top[place], self._nll[place] = block.own, block.top, block.nll
        self._crcs[chunk, row] = block.crc

    def finish(self) -> None:
        """Make the blocks readable."""
        self._file.flush()

    def compare(self, logits: F32, chunk: int, row: int, targets: I32) -> Sums:
        """float64 [3]: divergence, tokens with the same top token, and -ln p of the next token, summed over a block.

        The divergence of the stored predictions from the exact ones, which are stored with 16 bits, is subtracted: the same
        logits give exactly 0.
        """
        n = len(targets)
        place = chunk, slice(row, row + n)
        base: Rows = np.fromfile(self._path, np.uint16, n * self._words, offset=self._offset(chunk, row)).reshape(n, -1)
        scores = compare_rows(logits, base, targets)
        same = np.count_nonzero(logits.argmax(axis=1) == self._top[place])
        return np.array([(scores["kld"] - self._own[place]).sum(), same, scores["nll"].sum(dtype=np.float64)])

    def is_same(self, chunk: int, row: int, crc: int) -> bool:
        """Whether a block's logits have the checksum of those that were kept."""
        return self._crcs[chunk, row] == crc

    def result(self, trial: str, chunks: Sequence[int], sums: Sums) -> TrialResult:
        """A trial's result for ``chunks`` (numbers in the text). ``sums`` float64 [n_chunks, 3] as of :meth:`compare`."""
        n = len(chunks)
        kld, same, nll = sums.T.tolist()
        base = self._nll[:n].sum(axis=1).tolist()
        return TrialResult(
            trial, tuple(chunks), (self._n_rows,) * n, tuple(kld), tuple(map(int, same)), tuple(nll), tuple(base)
        )

    def _offset(self, chunk: int, row: int) -> int:
        return 2 * (chunk * self._n_rows + row) * self._words


def checksum(logits: F32) -> int:
    return zlib.crc32(logits.data)


def is_enough(divergences: Sums, enough: float) -> bool:
    """Whether the standard error of the mean over chunks is below ``enough`` times the mean."""
    n = len(divergences)
    if n < _FEWEST or enough <= 0:
        return False
    return float(divergences.std(ddof=1)) / math.sqrt(n) <= enough * float(divergences.mean())
