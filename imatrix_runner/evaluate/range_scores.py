"""Token scores of one subject that arrive range by range, in any order, and are kept in the order of the text.

The file is that of a measurement in one job, so that either continues what the other began. Scores that arrive before those of
earlier chunks wait in files of the same format next to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from imatrix_runner.engines.files.logits import scored_tokens
from imatrix_runner.engines.files.token_scores import TOKEN, Tokens, TokenScoresFile, read_token_scores
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.errors import InvalidDataError, RunnerError, from_os_error

_AHEAD = ".ahead"


class RangeScoresFile:
    """The scores of one subject in ``path``, open for appending."""

    def __init__(self, path: Path, fingerprint: str, options: CollectOptions, ranges: Sequence[ChunkRange]) -> None:
        """``ranges``: all of the text, in order."""
        self._path, self._fingerprint, self._n_ctx, self._ranges = path, fingerprint, options.n_ctx, ranges
        self.error: RunnerError | None = None
        """Of the first range that could not be measured."""
        self.seconds = 0.0
        self._failed: dict[ChunkRange, RunnerError] = {}
        self._file = TokenScoresFile(path, fingerprint, options.n_ctx)
        if self._file.chunks < ranges[-1].end:
            self._file.cut(self._file.chunks // options.chunks_at_once * options.chunks_at_once)  # a cut batch has other bits
        self._append_waiting()

    @property
    def done(self) -> int:
        """Number of chunks with stored scores, from the first on."""
        return self._file.chunks

    def lacks(self, chunks: ChunkRange) -> bool:
        """Whether scores of this range are missing."""
        return self.done < chunks.end and self._waiting(chunks) is None

    def take(self, chunks: ChunkRange, scores: bytes | RunnerError, seconds: float) -> None:
        """Keep the scores of a range, or why there are none. Raises :class:`InvalidDataError` for another number of them."""
        self.seconds += seconds
        if isinstance(scores, RunnerError):
            self._failed[chunks] = scores
        else:
            tokens = _tokens_of(scores, chunks, self._n_ctx)
            if self.done < chunks.first:
                self._keep(chunks, tokens)
            else:
                self._append(chunks, tokens)
        self._append_waiting()

    def close(self) -> None:
        self._file.close()

    def _append(self, chunks: ChunkRange, tokens: Tokens) -> None:
        try:
            for chunk in tokens[self.done - chunks.first :]:
                self._file.append([chunk])
            self._file.sync()
        except OSError as error:
            raise from_os_error(error, "writing scored tokens", self._path) from error

    def _append_waiting(self) -> None:
        """Append what has arrived and follows; note the error that comes next, if one does."""
        for chunks in self._ranges:
            if self.done >= chunks.end:
                continue
            tokens = self._waiting(chunks)
            if tokens is None:
                self.error = self._failed.get(chunks)
                return
            self._append(chunks, tokens)
            self._ahead(chunks).unlink()

    def _ahead(self, chunks: ChunkRange) -> Path:
        return self._path.with_name(f"{self._path.name}.{chunks.first:06d}-{chunks.end:06d}{_AHEAD}")

    def _waiting(self, chunks: ChunkRange) -> Tokens | None:
        tokens = read_token_scores(self._ahead(chunks), self._fingerprint, self._n_ctx)
        return tokens if len(tokens) == chunks.count else None

    def _keep(self, chunks: ChunkRange, tokens: Tokens) -> None:
        path = self._ahead(chunks)
        try:
            with closing(TokenScoresFile(path, self._fingerprint, self._n_ctx)) as file:
                file.cut(0)
                for chunk in tokens:
                    file.append([chunk])
                file.sync()
        except OSError as error:
            raise from_os_error(error, "writing scored tokens", path) from error


def remove_waiting(folder: Path) -> None:
    """Remove scores that wait for those of earlier chunks."""
    for path in _all_waiting(folder):
        path.unlink(missing_ok=True)


def _all_waiting(folder: Path) -> Iterator[Path]:
    return folder.glob(f"*{_AHEAD}")


def _tokens_of(scores: bytes, chunks: ChunkRange, n_ctx: int) -> Tokens:
    """:data:`TOKEN` [count, rows] of the bytes of a range's scores."""
    rows = scored_tokens(n_ctx)
    if len(scores) != chunks.count * rows * TOKEN.itemsize:
        raise InvalidDataError(
            f"The scores of the chunks {chunks.first} to {chunks.end - 1} are incomplete",
            f"{len(scores)} bytes arrived, not those of {chunks.count * rows} tokens",
            "Run the same command again; report it if it comes back.",
        )
    return np.frombuffer(scores, TOKEN).reshape(chunks.count, rows)
