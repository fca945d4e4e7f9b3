"""Scored tokens on the disk: one record of fixed size for each chunk, appended, each with its checksum.

A kill leaves at most one torn record, which does not count; the fingerprint at the beginning says what all of them are of.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imatrix_runner.engines.embedded.judging import TOKEN, Tokens
from imatrix_runner.engines.logits_file import scored_tokens
from imatrix_runner.files import sync

_HEAD = 32


class ScoredFile:
    """``path`` open for appending, with the whole chunks that it holds of ``fingerprint``; anything else in it is dropped."""

    def __init__(self, path: Path, fingerprint: str, n_ctx: int) -> None:
        self._rows = scored_tokens(n_ctx)
        self._record = self._rows * TOKEN.itemsize + 4
        head = hashlib.sha256(fingerprint.encode()).digest()
        self._handle = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        same = self._handle.read(_HEAD) == head
        self.chunks = self._whole() if same else 0
        if not same:
            self._handle.seek(0)
            self._handle.write(head)
        self.cut(self.chunks)

    def _whole(self) -> int:
        chunks = 0
        while len(record := self._handle.read(self._record)) == self._record and _sealed(record):
            chunks += 1
        return chunks

    def cut(self, chunks: int) -> None:
        """Keep the first ``chunks`` only."""
        self.chunks = chunks
        self._handle.truncate(_HEAD + chunks * self._record)
        self._handle.seek(0, os.SEEK_END)

    def append(self, pieces: Sequence[Tokens]) -> None:
        """One more chunk: pieces of :data:`TOKEN`, [rows] together."""
        data = b"".join(piece.tobytes() for piece in pieces)
        self._handle.write(data + zlib.crc32(data).to_bytes(4, "little"))
        self.chunks += 1

    def sync(self) -> None:
        self._handle.flush()
        sync(self._handle.fileno())

    def close(self) -> None:
        self._handle.close()


def scored_bytes(n_chunks: int, n_ctx: int) -> int:
    """How long a file of so many chunks is."""
    return _HEAD + n_chunks * (scored_tokens(n_ctx) * TOKEN.itemsize + 4)


def read_scored(path: Path, fingerprint: str, n_ctx: int) -> Tokens:
    """The whole chunks from the first on, :data:`TOKEN` [n_chunks, rows]; none where the file is of something else."""
    rows = scored_tokens(n_ctx)
    record = rows * TOKEN.itemsize + 4
    data = path.read_bytes() if path.is_file() else b""
    if not data.startswith(hashlib.sha256(fingerprint.encode()).digest()):
        return np.zeros((0, rows), TOKEN)
    records = (data[at : at + record] for at in range(_HEAD, len(data) - record + 1, record))
    whole = [each[:-4] for each in itertools.takewhile(_sealed, records)]
    return np.frombuffer(b"".join(whole), TOKEN).reshape(-1, rows)


def _sealed(record: bytes) -> bool:
    return zlib.crc32(record[:-4]).to_bytes(4, "little") == record[-4:]
