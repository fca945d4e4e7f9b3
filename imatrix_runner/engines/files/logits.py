"""llama-perplexity's ``--kl-divergence-base`` file: a model's log-probabilities over a text, 16 bits each.

Layout, little endian (tools/perplexity/perplexity.cpp): ``_logits_``, u32 n_ctx, i32 n_vocab, i32 n_chunk,
i32 tokens[n_chunk * n_ctx], then the scored rows of every chunk. A row is f32 scale, f32 min_log_prob and u16 q[n_vocab] (one
more if n_vocab is odd): log p = scale * q + min_log_prob.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError, from_os_error

MAGIC = b"_logits_"
_HEAD = struct.Struct("<8sIii")
_MOST_VOCAB = 1 << 24
_MOST_CTX = 1 << 24
LEADING = 4
"""Number of u16 that hold a row's scale and min_log_prob."""
_DEEPEST = 24.0
"""Log-probabilities are clipped at this distance below the likeliest token's: 16 in llama.cpp, 24 in ik_llama.cpp."""

Rows = npt.NDArray[np.uint16]


def scored_tokens(n_ctx: int) -> int:
    """Number of rows of a chunk: the predictions in its second half."""
    return n_ctx - 1 - n_ctx // 2


def row_words(n_vocab: int) -> int:
    """Number of u16 in a row."""
    return 2 * ((n_vocab + 1) // 2) + LEADING


@dataclass(frozen=True)
class LogitsHead:
    """A file's header. All sizes in bytes follow from its three numbers."""

    n_ctx: int
    n_vocab: int
    n_chunks: int

    @property
    def rows(self) -> int:
        """Rows of one chunk."""
        return scored_tokens(self.n_ctx)

    @property
    def chunk_bytes(self) -> int:
        return 2 * self.rows * row_words(self.n_vocab)

    @property
    def tokens_at(self) -> int:
        return _HEAD.size

    @property
    def rows_at(self) -> int:
        """Offset of the first chunk's rows."""
        return _HEAD.size + 4 * self.n_chunks * self.n_ctx

    @property
    def n_bytes(self) -> int:
        """Size of the whole file."""
        return self.rows_at + self.n_chunks * self.chunk_bytes

    def pack(self) -> bytes:
        return _HEAD.pack(MAGIC, self.n_ctx, self.n_vocab, self.n_chunks)


def note_path(path: Path) -> Path:
    """Path of the fingerprint file stored next to a reference logits file."""
    return path.with_name(path.name + ".of")


def is_whole(path: Path, head: LogitsHead, fingerprint: str) -> bool:
    """Whether the file is complete and was written for this ``fingerprint``."""
    note = note_path(path)
    written = path.is_file() and note.is_file() and path.stat().st_size == head.n_bytes
    return written and note.read_text(encoding="utf-8") == fingerprint


def read_head(path: Path) -> LogitsHead:
    """Read the header. Raises :class:`InvalidDataError` if the file is of another kind or incomplete."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            data = handle.read(_HEAD.size)
    except OSError as error:
        raise from_os_error(error, "reading log-probabilities", path) from error
    if len(data) < _HEAD.size or not data.startswith(MAGIC):
        raise _bad(path, "it does not begin with _logits_")
    _, n_ctx, n_vocab, n_chunks = _HEAD.unpack(data)
    if not (2 < n_ctx <= _MOST_CTX and 0 < n_vocab <= _MOST_VOCAB and 0 < n_chunks <= 1 << 24):
        raise _bad(path, f"it would hold {n_chunks} chunks of {n_ctx} tokens of a vocabulary of {n_vocab}")
    head = LogitsHead(n_ctx, n_vocab, n_chunks)
    if size != head.n_bytes:
        raise _bad(
            path, f"{head.n_chunks} chunks take {head.n_bytes} bytes, and it has {size}: the run that wrote it was interrupted"
        )
    return head


def read_tokens(path: Path, head: LogitsHead) -> npt.NDArray[np.int32]:
    """int32 [n_chunks, n_ctx]: the text's tokens, without the BOS that replaces the first of each chunk in computation."""
    tokens: npt.NDArray[np.int32] = np.fromfile(path, "<i4", head.n_chunks * head.n_ctx, offset=head.tokens_at)
    return tokens.reshape(head.n_chunks, head.n_ctx)


def read_rows(path: Path, head: LogitsHead, chunk: int, row: int, count: int) -> Rows:
    """uint16 [count, row_words]: rows ``row`` .. ``row + count - 1`` of a chunk. Read, not mapped: touched pages of a mapped
    file of many gigabytes would count as memory of this process."""
    words = row_words(head.n_vocab)
    at = head.rows_at + chunk * head.chunk_bytes + 2 * row * words
    rows: Rows = np.fromfile(path, "<u2", count * words, offset=at)
    if len(rows) < count * words:
        raise _bad(path, "it became shorter while it was read")
    return rows.reshape(count, words)


def map_rows(path: Path, head: LogitsHead, chunk: int) -> Rows:
    """uint16 [rows, row_words]: all rows of a chunk, mapped, for access to a few numbers of each."""
    shape = (head.rows, row_words(head.n_vocab))
    return np.memmap(path, "<u2", "r", head.rows_at + chunk * head.chunk_bytes, shape)


def factors(rows: Rows) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Each row's scale and min_log_prob, float32 [n]."""
    leading = np.ascontiguousarray(rows[:, :LEADING]).view("<f4")
    return leading[:, 0], leading[:, 1]


def first_invalid_chunk(path: Path, head: LogitsHead) -> int | None:
    """The first chunk with a row that finite logits cannot give, or None. NaN or infinite logits make the row's scale or
    min_log_prob NaN or infinite; finite ones are stored at most :data:`_DEEPEST` apart."""
    least_of_all = -_DEEPEST - np.log(head.n_vocab) - 1
    for chunk in range(head.n_chunks):
        scale, least = factors(map_rows(path, head, chunk))
        possible = (scale >= 0) & (scale <= (_DEEPEST + 1) / 65535) & (least >= least_of_all) & (least <= 1)
        if not possible.all():
            return chunk
    return None


def _bad(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(f"{path} cannot be compared with", why, "Remove it: it is made again from the source model.")
