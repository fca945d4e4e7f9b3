"""Rows of Parquet files of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imatrix_runner.documents.documents import MAX_ROW, SHORTEN, TOO_LONG, BadRecord, Row
from imatrix_runner.documents.streams import bad_source
from imatrix_runner.errors import RunnerError, from_os_error
from imatrix_runner.extras import CALIBRATION
from imatrix_runner.files import human_bytes
from imatrix_runner.safe_text import printable

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_MOST_ROWS = 64
_BATCH_BYTES = 32 << 20
_SWOLLEN_BYTES, _SWOLLEN_TIMES = 256 << 20, 100
"""A row group that unpacks to more bytes than both this number and this multiple of the file's size is refused, because its
pages may not fit in memory."""

_PAGE_BUFFER = 1 << 20  # without a buffer size a whole column of a row group is read at once


def parquet_rows(path: Path, shown: str, on_bytes: Callable[[int], None]) -> Iterator[Row | BadRecord]:
    """One row for each row of the file, with the columns of text, booleans and numbers.

    A few rows are in memory at a time, with their pages, whose size the file's writer chose. Raises :class:`InvalidDataError`
    for a file that is damaged or has no text.
    """
    CALIBRATION.require("Reading a Parquet file")
    import pyarrow
    import pyarrow.parquet

    try:
        size = path.stat().st_size
        file = pyarrow.parquet.ParquetFile(path, buffer_size=_PAGE_BUFFER, pre_buffer=False)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _damaged(error, shown) from error
    with file:
        if not any(_holds_text(field.type) or _is_bytes(field.type) for field in schema):
            names = ", ".join(printable(name[:40]) for name in schema.names[:8])
            raise bad_source(shown, f"it has no text column; its columns: {names}", "Give another file.")
        columns = [field.name for field in schema if _is_wanted(field.type)]
        n_rows, first, reported = file.metadata.num_rows, 1, 0
        for group in range(file.num_row_groups):
            for batch in _batches(file, group, columns, shown, size):
                if isinstance(batch, int):
                    where = f"{shown}, row {first}" + (f" to {first + batch - 1}" if batch > 1 else "")
                    yield BadRecord(where, TOO_LONG, SHORTEN)
                    first += batch
                else:
                    yield from _rows(batch, shown, first)
                    first += batch.num_rows
                done = size * min(first - 1, n_rows) // max(n_rows, 1)
                on_bytes(done - reported)
                reported = done


def _batches(
    file: pyarrow.parquet.ParquetFile, group: int, columns: list[str], shown: str, file_size: int
) -> Iterator[pyarrow.RecordBatch | int]:
    """The rows of a row group in small batches; or their number, if their mean size exceeds ``MAX_ROW``."""
    import pyarrow

    try:
        # The row group's metadata only: pyarrow aborts the process on damaged metadata of a column.
        metadata = file.metadata.row_group(group)
        n_rows, size = metadata.num_rows, metadata.total_byte_size
        if n_rows > 0 and size // n_rows > MAX_ROW and len(columns) == len(file.schema_arrow):
            yield n_rows
            return
        if size > max(_SWOLLEN_BYTES, _SWOLLEN_TIMES * file_size):
            why = f"its {human_bytes(file_size)} unpack to {human_bytes(size)}, far more than text does"
            raise bad_source(shown, why, "Give another file.")
        # If rows repeat a value of the column's dictionary, a batch is larger than its stored bytes.
        most = max(1, min(_MOST_ROWS, _BATCH_BYTES // max(size, 1)))
        batches = file.iter_batches(most, row_groups=[group], columns=columns, use_threads=False)
        while (batch := next(batches, None)) is not None:
            yield batch
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _damaged(error, shown) from error


def _rows(batch: pyarrow.RecordBatch, shown: str, first: int) -> Iterator[Row | BadRecord]:
    """The rows of a batch. A value that Python cannot express (times in nanoseconds) or that is not UTF-8 costs its row
    only."""
    try:
        rows: list[dict[str, Any] | None] = list(batch.to_pylist()) if batch.nbytes <= MAX_ROW else [None] * batch.num_rows
    except (ValueError, OverflowError):
        rows = [None] * batch.num_rows
    for number, row in enumerate(rows):
        where = f"{shown}, row {first + number}"
        one = batch.slice(number, 1) if row is None else None
        if one is not None and one.nbytes > MAX_ROW:
            yield BadRecord(where, TOO_LONG, SHORTEN)
            continue
        try:
            fields = row if one is None else one.to_pylist()[0]
        except (ValueError, OverflowError) as error:
            yield BadRecord(where, f"it cannot be read: {printable(str(error)[:200])}", "Correct or remove that row.")
            continue
        assert fields is not None
        yield Row(where, {name: _text(value) for name, value in fields.items()})


def _text(value: Any) -> Any:
    """The value, with bytes decoded: older writers do not mark a column of bytes as text."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _is_wanted(kind: pyarrow.DataType) -> bool:
    """Whether a column is read: text and plain values are; images, sound and embeddings are not."""
    import pyarrow.types as types

    plain = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return plain or _is_bytes(kind) or _holds_text(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_text(kind: pyarrow.DataType) -> bool:
    """Whether a type contains strings, at any depth, and no bytes."""
    return any(map(_is_string, _leaves(kind))) and not any(map(_is_bytes, _leaves(kind)))


def _is_string(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _leaves(kind: pyarrow.DataType) -> Iterator[pyarrow.DataType]:
    """The plain types that a nested type consists of."""
    import pyarrow
    import pyarrow.types as types

    if isinstance(kind, pyarrow.BaseExtensionType):
        inner = [kind.storage_type]
    elif types.is_struct(kind):
        inner = [field.type for field in kind]
    elif types.is_map(kind):
        inner = [kind.key_type, kind.item_type]
    else:
        inner = [kind.value_type] if hasattr(kind, "value_type") else []
    if not inner:
        yield kind
    for each in inner:
        yield from _leaves(each)


def _damaged(error: Exception, shown: str) -> RunnerError:
    if isinstance(error, OSError) and error.errno:
        return from_os_error(error, "reading a source of calibration text", shown)
    reason = printable(str(error).split("\n", 1)[0][:200])
    return bad_source(shown, f"it is not a Parquet file, or a damaged one: {reason}", "Download or create it again.")
