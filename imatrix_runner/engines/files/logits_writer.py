"""Writes log-probabilities in llama-perplexity's format (:mod:`~imatrix_runner.engines.files.logits`)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.logits import LogitsHead, Rows, note_path
from imatrix_runner.files import open_to_continue, sync

_BLOCK = 8 << 20


class LogitsWriter:
    """A growing file: head and ``tokens`` int32 [n_chunks, n_ctx] first, then rows. A file of the same ``fingerprint`` is
    continued; ``chunks`` of it are complete. The fingerprint is stored in a file next to it (:func:`note_path`).

    The rows of a batch come by slices of all its chunks, and the last row of its last chunk comes last: the file's length
    shows how many batches are complete.
    """

    def __init__(self, path: Path, head: LogitsHead, tokens: npt.NDArray[np.int32], fingerprint: str) -> None:
        self._head = head
        note = note_path(path)
        start = head.pack() + tokens.astype("<i4").tobytes()
        same = note.is_file() and note.read_text(encoding="utf-8") == fingerprint and path.is_file()
        self._handle: IO[bytes] = open_to_continue(path, "writing the reference")
        same = same and self._handle.read(len(start)) == start
        size = path.stat().st_size
        self.chunks = max(0, size - head.rows_at) // head.chunk_bytes if same else 0
        self._syncer = ThreadPoolExecutor(1)
        self._synced: Future[None] = self._syncer.submit(lambda: None)
        if not same:
            self._handle.seek(0)
            self._handle.write(start)
            self._handle.truncate()
            note.write_text(fingerprint, encoding="utf-8")

    def cut(self, chunks: int) -> None:
        self.chunks = chunks
        self._handle.truncate(self._head.rows_at + chunks * self._head.chunk_bytes)

    def write(self, chunk: int, row: int, rows: Rows) -> None:
        self._handle.seek(self._head.rows_at + chunk * self._head.chunk_bytes + 2 * row * rows.shape[1])
        self._handle.write(rows.data)

    def sync(self) -> None:
        """Sync the written rows (up to 260 MB) to disk while the next batch is computed."""
        self._handle.flush()
        self._synced.result()
        self._synced = self._syncer.submit(sync, self._handle.fileno())

    def close(self) -> None:
        with closing(self._handle), self._syncer:
            self._synced.result()


def copy_first_chunks(source: Path, head: LogitsHead, n_chunks: int, target: Path) -> LogitsHead:
    """Write a file with the first ``n_chunks`` of ``source``, and return its head. Raises ``OSError``."""
    fewer = replace(head, n_chunks=n_chunks)
    with source.open("rb") as reader, target.open("wb") as out:
        out.write(fewer.pack())
        _copy(reader, out, head.tokens_at, fewer.rows_at - fewer.tokens_at)
        _copy(reader, out, head.rows_at, fewer.n_bytes - fewer.rows_at)
    return fewer


def _copy(source: IO[bytes], target: IO[bytes], begin: int, n_bytes: int) -> None:
    source.seek(begin)
    while n_bytes and (block := source.read(min(n_bytes, _BLOCK))):
        target.write(block)
        n_bytes -= len(block)
