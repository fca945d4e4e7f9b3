"""Reads and writes imatrices in both formats: converts between files and :class:`Matrix`.

:mod:`~imatrix_runner.engines.files.imatrix_file` and :mod:`~imatrix_runner.engines.files.imatrix_writer` handle the bytes. This
module requires names without control characters, and whole numbers as counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.files.imatrix_file import ImatrixFormat, StoredEntry, read_imatrix, unusable
from imatrix_runner.engines.files.imatrix_writer import Numbers, write_gguf_imatrix, write_legacy_imatrix
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.files import discard, part_path, publish
from imatrix_runner.imatrix.matrix import Counts, Matrix, Sums
from imatrix_runner.imatrix.stored_entries import StoredEntries
from imatrix_runner.models.gguf_file import MAX_NAME
from imatrix_runner.models.gguf_writer import text_entry
from imatrix_runner.models.imatrix_layout import SUMS, imatrix_entries
from imatrix_runner.safe_text import printable

Format = ImatrixFormat

_MAX_COUNT = 1 << 53


@dataclass(frozen=True)
class MatrixFile:
    """An imatrix and the format of the file it was read from."""

    path: Path
    format: Format
    matrix: Matrix

    def describe(self) -> str:
        """``GGUF, 36 entries, 125 chunks of 512 tokens, dataset code.txt``."""
        matrix = self.matrix
        size = f" of {matrix.chunk_size} tokens" if matrix.chunk_size else ""
        names = ", ".join(Path(name).name for name in matrix.datasets) or "dataset unknown"
        kind = "GGUF" if self.format == "gguf" else "legacy .dat"
        return f"{kind}, {len(matrix.entries)} entries, {matrix.chunk_count} chunks{size}, {names}"


def read(path: Path, *, exact: bool = False) -> MatrixFile:
    """Read an imatrix of either format. Raises :class:`InvalidDataError`, which says what the file is instead.

    ``exact`` also admits F64 sums with I64 counts, which checkpoints hold and llama-quantize refuses.
    """
    stored = read_imatrix(path, exact=exact, strict=True)
    entries = {name.decode(): entry for name, entry in stored.entries.items()}
    counts = {name: _counts(name, entry) for name, entry in entries.items()}
    datasets = tuple(printable(name.decode("utf-8", "replace")) for name in stored.datasets)
    matrix = Matrix(StoredEntries(entries, counts), stored.chunk_size, stored.chunk_count, datasets)
    return MatrixFile(path, stored.format, matrix)


def _counts(name: str, entry: StoredEntry) -> Counts:
    """int64 [n_mat]. A legacy value is (Σx²/count)*ncall, so the mean square is value/ncall: it is kept as sums with a count of
    ncall."""
    if entry.counts_at is None:
        return np.array([max(entry.calls, 1)], np.int64)
    with np.errstate(invalid="ignore"):  # of a signalling NaN, which is refused below
        tokens = entry.counts().astype(np.int64 if entry.exact else np.float64)
    if not ((tokens >= -_MAX_COUNT) & (tokens <= _MAX_COUNT)).all():
        raise unusable(entry.file.path, f"{name} has a count that is NaN, infinite or absurd")
    return np.rint(tokens).astype(np.int64)


def write(matrix: Matrix, path: Path, kind: Format) -> None:
    """Write ``matrix`` in either format, atomically."""
    publish(prepare_gguf(matrix, path) if kind == "gguf" else _prepare_dat(matrix, path), path)


def write_gguf(matrix: Matrix, path: Path) -> None:
    """Write ``matrix`` as llama-imatrix does: keys ``imatrix.*``, per weight F32 ``.in_sum2`` and ``.counts``, names sorted."""
    publish(prepare_gguf(matrix, path), path)


def prepare_gguf(matrix: Matrix, path: Path, *, exact: bool = False, facts: Mapping[str, str] | None = None) -> Path:
    """Write the new ``path`` under its temporary name and return that; :func:`publish` renames it.

    ``exact``: F64 sums and I64 counts, for checkpoints. ``facts`` are further metadata.
    """

    def numbers(name: str) -> tuple[Numbers, Numbers]:
        entry = matrix.entries[name]
        return (entry.sums, entry.counts) if exact else (_float32(name, entry.sums), entry.counts)

    shapes = {name: matrix.shape(name) for name in matrix.entries}
    if too_long := [name for name in sorted(shapes) if len((name + SUMS).encode()) > MAX_NAME]:
        raise _not_written(f"the name {too_long[0]} is longer than a GGUF imatrix can hold")
    with _growing(path) as part:
        entries = imatrix_entries(matrix.datasets, matrix.chunk_count, matrix.chunk_size)
        entries += [text_entry(key, value) for key, value in (facts or {}).items()]
        write_gguf_imatrix(part, shapes, numbers, entries, exact=exact)
    return part


def _prepare_dat(matrix: Matrix, path: Path) -> Path:
    """Write the legacy layout under the temporary name of ``path``, as llama-imatrix does: float32 ``value / count * ncall``, 1
    for an expert without data, entries without any data left out."""
    size = matrix.chunk_size or 1
    names = [name for name in sorted(matrix.entries) if matrix.counts(name).any()]
    if not names:
        raise _not_written("none of its entries counted a token, and a legacy file leaves such entries out")

    def entry(name: str) -> tuple[bytes, int, npt.NDArray[np.float32]]:
        found = matrix.entries[name]
        calls = -(-int(found.counts.max()) // size)
        counts = found.counts.astype(np.float32).reshape(-1, 1)
        values = np.where(counts == 0, np.float32(1), _float32(name, found.sums)) / np.maximum(counts, np.float32(1))
        with np.errstate(over="ignore"):
            values *= np.float32(calls)
        return name.encode(), calls, _float32(name, values)

    dataset = (matrix.datasets[-1] if matrix.datasets else "").encode()
    with _growing(path) as part:
        write_legacy_imatrix(part, len(names), map(entry, names), matrix.chunk_count, dataset)
    return part


@contextmanager
def _growing(path: Path) -> Iterator[Path]:
    """Yield the temporary name of ``path``; on any error the file there is removed."""
    part = part_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except OSError as error:
        discard(part)
        raise from_os_error(error, f"writing {path.name}", path) from error
    except struct.error as error:
        discard(part)
        raise _not_written("its counts are larger than the format can hold") from error
    except BaseException:
        discard(part)
        raise


def _float32(name: str, sums: Sums | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return ``sums`` as files hold them. Raises :class:`InvalidDataError` for values that llama-quantize would refuse."""
    with np.errstate(over="ignore"):
        narrow = sums.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise _not_written(f"{name} holds NaN, infinite values or sums beyond float32, and llama-quantize would refuse it")
    return narrow


def _not_written(why: str) -> InvalidDataError:
    return InvalidDataError("The imatrix was not written", why, "Check the inputs with: imatrix-runner imatrix stats FILE")
