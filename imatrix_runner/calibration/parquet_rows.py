"""Rows of Parquet files of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imatrix_runner.calibration.documents import BadRecord
from imatrix_runner.calibration.rows import MAX_ROW, SHORTEN, TOO_LONG, Row
from imatrix_runner.calibration.streams import bad_source
from imatrix_runner.errors import RunnerError, from_os_error
from imatrix_runner.files import human_bytes
from imatrix_runner.models.bounded import printable

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_MOST_ROWS = 64
_BATCH_BYTES = 32 << 20
_SWOLLEN_BYTES, _SWOLLEN_TIMES = 256 << 20, 100
"""A row group that unpacks to this many bytes, and to this many times the file's size, is refused: pages may not fit memory."""

_PAGE_BUFFER = 1 << 20  # without it a whole column of a row group is read at once


def parquet_rows(path: Path, shown: str, on_bytes: Callable[[int], None]) -> Iterator[Row | BadRecord]:
    """One row for each of the file's, with the columns that hold text and those of plain numbers.

    A few rows are in memory at a time, and the pages they lie in, which are as large as their writer made them. Raises
    :class:`InvalidDataError` for a file that is damaged or has no text.
    """
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
            raise bad_source(shown, f"none of its columns holds text; it has: {names}", "Give another file.")
        columns = [field.name for field in schema if _is_wanted(field.type)]
        n_rows, first, told = file.metadata.num_rows, 1, 0
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
                on_bytes(done - told)
                told = done


def _batches(
    file: pyarrow.parquet.ParquetFile, group: int, columns: list[str], shown: str, file_size: int
) -> Iterator[pyarrow.RecordBatch | int]:
    """A row group's rows, a few at a time; or how many there are, where each of them is longer than a record may be."""
    import pyarrow

    try:
        # Of each column's own metadata pyarrow makes an abort of the process where it is damaged.
        told = file.metadata.row_group(group)
        n_rows, size = told.num_rows, told.total_byte_size
        if n_rows > 0 and size // n_rows > MAX_ROW and len(columns) == len(file.schema_arrow):
            yield n_rows
            return
        if size > max(_SWOLLEN_BYTES, _SWOLLEN_TIMES * file_size):
            why = f"{human_bytes(file_size)} of it unpack to {human_bytes(size)}, which no text does"
            raise bad_source(shown, why, "Give another file.")
        # Where rows repeat a value of the column's dictionary, a batch is larger than what is stored of it.
        most = max(1, min(_MOST_ROWS, _BATCH_BYTES // max(size, 1)))
        batches = file.iter_batches(most, row_groups=[group], columns=columns, use_threads=False)
        while (batch := next(batches, None)) is not None:
            yield batch
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise _damaged(error, shown) from error


def _rows(batch: pyarrow.RecordBatch, shown: str, first: int) -> Iterator[Row | BadRecord]:
    """A batch's rows. Values Python has no equal for (times to the nanosecond) or that are no UTF-8 cost their row only."""
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
            yield BadRecord(where, f"it cannot be read: {printable(str(error)[:200])}", "Mend or remove that row.")
            continue
        assert fields is not None
        yield Row(where, {name: _text(value) for name, value in fields.items()})


def _text(value: Any) -> Any:
    """Older writers do not say that a column's bytes are text."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _is_wanted(kind: pyarrow.DataType) -> bool:
    """Whether a column is worth reading: pictures, sounds and embeddings are not."""
    import pyarrow.types as types

    plain = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)
    return plain or _is_bytes(kind) or _holds_text(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_text(kind: pyarrow.DataType) -> bool:
    """Whether there are strings somewhere in it, and no bytes beside them."""
    return any(map(_is_string, _leaves(kind))) and not any(map(_is_bytes, _leaves(kind)))


def _is_string(kind: pyarrow.DataType) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _leaves(kind: pyarrow.DataType) -> Iterator[pyarrow.DataType]:
    """The plain types a type is made of."""
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
    return bad_source(shown, f"it is no Parquet file, or a damaged one: {reason}", "Download or make it again.")
