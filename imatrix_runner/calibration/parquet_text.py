"""One text out of a Parquet file: the same bytes whenever it is made from the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from imatrix_runner.calibration.catalogue import Rows
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.files import human_bytes
from imatrix_runner.models.bounded import printable

if TYPE_CHECKING:
    import pyarrow.parquet

_COLUMNS = ("text", "content")
_BATCH_ROWS = 128


def parquet_to_text(source: Path, target: IO[bytes], *, rows: Rows, limit: int, check: Callable[[], None]) -> int:
    """Write the text column of ``source`` as UTF-8; return the number of documents (or lines).

    ``documents`` are stripped and separated by one blank line, empty ones left out. ``lines`` are written as they are, and an
    empty one as a space and a line end, as WikiText's own files have it. Raises :class:`InvalidDataError` for what is no
    Parquet, has no text column, or would make more than ``limit`` bytes.
    """
    import pyarrow
    import pyarrow.parquet

    count = written = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            column = _text_column(file, source, limit)
            for row in _rows(file, column):
                check()
                piece = _line(row) if rows == "lines" else _document(row, first=count == 0)
                if piece:
                    count += 1
                    written += target.write(piece)
                if written > limit:
                    raise _too_large(source, limit)
    except OSError as error:
        raise from_os_error(error, "making a text of a Parquet file", source) from error
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _unusable(source, f"it cannot be read as Parquet ({printable(str(error))[:200]})") from error
    if not written:
        raise _unusable(source, f"its column {column!r} is empty")
    return count


def _rows(file: pyarrow.parquet.ParquetFile, column: str) -> Iterator[str | None]:
    for batch in file.iter_batches(_BATCH_ROWS, columns=[column]):
        yield from batch.column(0).to_pylist()


def _line(row: str | None) -> bytes:
    line = row or " "
    return (line if line.endswith("\n") else f"{line}\n").encode()


def _document(row: str | None, *, first: bool) -> bytes:
    text = (row or "").strip()
    return f"{'' if first else chr(10)}{text}\n".encode() if text else b""


def _text_column(file: pyarrow.parquet.ParquetFile, source: Path, limit: int) -> str:
    """``text``, else ``content``, else the only column of texts; refused when it is announced longer than ``limit``."""
    import pyarrow.types

    schema = file.schema_arrow
    texts = [field.name for field in schema if pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)]
    column = next((name for name in _COLUMNS if name in texts), texts[0] if len(texts) == 1 else None)
    if column is None:
        held = ", ".join(printable(name) for name in schema.names[:8])
        raise _unusable(
            source, f"no column is called {' or '.join(_COLUMNS)}, nor is one alone a text; it has {held or 'none'}"
        )
    metadata = file.metadata
    announced = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            announced += chunk.total_uncompressed_size if chunk.path_in_schema == column else 0
    if announced > limit:
        raise _too_large(source, limit)
    return column


def _too_large(source: Path, limit: int) -> InvalidDataError:
    return InvalidDataError(
        f"{source.name} is too large",
        f"its text would have more than {human_bytes(limit)}",
        "Choose a smaller one: a megabyte is more than a matrix needs.",
    )


def _unusable(source: Path, why: str) -> InvalidDataError:
    return InvalidDataError(f"{source.name} makes no text", why, "Choose another one with: imatrix-runner calibration list")
