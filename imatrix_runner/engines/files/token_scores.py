"""Token scores on disk: one appended record of fixed size for each chunk, with its checksum.

A kill leaves at most one torn record, which is ignored. The file begins with the fingerprint of the job.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.logits import scored_tokens
from imatrix_runner.files import open_to_continue, sync

TOKEN = np.dtype([("nll", "<f4"), ("base", "<f4"), ("kld", "<f8"), ("dp", "<f4"), ("same", "<u4")])
"""One scored token: -ln p(token) of the level and of the reference, the Kullback-Leibler divergence of the level from the
reference, p - p(reference), and whether both put the same token first."""

Tokens = npt.NDArray[np.void]

_HEAD, _CHECKSUM = 32, 4  # bytes: a SHA-256, a CRC-32


class TokenScoresFile:
    """``path`` open for appending. It keeps the complete chunks of the same ``fingerprint``; anything else in it is dropped."""

    def __init__(self, path: Path, fingerprint: str, n_ctx: int) -> None:
        self._record = _record_bytes(n_ctx)
        head = _head(fingerprint)
        self._handle = open_to_continue(path, "writing scored tokens")
        same = self._handle.read(_HEAD) == head
        self.chunks = sum(1 for _ in _records(self._handle, self._record)) if same else 0
        if not same:
            self._handle.seek(0)
            self._handle.write(head)
        self.cut(self.chunks)

    def cut(self, chunks: int) -> None:
        """Keep only the first ``chunks``."""
        self.chunks = chunks
        self._handle.truncate(_HEAD + chunks * self._record)
        self._handle.seek(0, os.SEEK_END)

    def append(self, blocks: Sequence[Tokens]) -> None:
        """Append a chunk: blocks of :data:`TOKEN` with [rows] elements together."""
        data = b"".join(block.tobytes() for block in blocks)
        self._handle.write(data + _checksum(data))
        self.chunks += 1

    def sync(self) -> None:
        self._handle.flush()
        sync(self._handle.fileno())

    def close(self) -> None:
        self._handle.close()


def token_scores_bytes(n_chunks: int, n_ctx: int) -> int:
    """Size, in bytes, of a file with ``n_chunks`` chunks."""
    return _HEAD + n_chunks * _record_bytes(n_ctx)


def read_token_scores(path: Path, fingerprint: str, n_ctx: int) -> Tokens:
    """The complete chunks from the first on, :data:`TOKEN` [n_chunks, rows]; none if there is no file of
    ``fingerprint``."""
    whole: list[bytes] = []
    if path.is_file():
        with path.open("rb") as handle:
            if handle.read(_HEAD) == _head(fingerprint):
                whole += _records(handle, _record_bytes(n_ctx))
    return np.frombuffer(b"".join(whole), TOKEN).reshape(-1, scored_tokens(n_ctx))


def _head(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()


def _record_bytes(n_ctx: int) -> int:
    return scored_tokens(n_ctx) * TOKEN.itemsize + _CHECKSUM


def _records(handle: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield the tokens of every record from the position of ``handle`` on, up to the first that is torn or damaged."""
    while len(record := handle.read(size)) == size:
        data = record[:-_CHECKSUM]
        if _checksum(data) != record[-_CHECKSUM:] or not _are_scores(np.frombuffer(data, TOKEN)):
            return
        yield data


def _are_scores(tokens: Tokens) -> bool:
    """Whether the scores are possible: every divergence is finite, and ``same`` is 0 or 1."""
    return bool(np.isfinite(tokens["kld"]).all() and (tokens["same"] <= 1).all())


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM, "little")
