"""Imatrix files: GGUF (current llama-imatrix) and the legacy ``.dat``, told apart by content, never by name.

Both are untrusted input: every length is checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.files import discard, part_path, publish
from imatrix_runner.imatrix.matrix import Matrix, Sums
from imatrix_runner.imatrix.stored import OpenFile, Place, StoredEntries
from imatrix_runner.models.bounded import printable
from imatrix_runner.models.gguf_file import MAX_NAME, GgufHeader, TensorInfo, read_header
from imatrix_runner.models.sniff import HEAD_BYTES, LFS_POINTER, UNKNOWN, foreign_format, is_legacy_imatrix

Format = Literal["gguf", "dat"]

SUMS = ".in_sum2"
COUNTS = ".counts"
DATASETS = "imatrix.datasets"
CHUNK_COUNT = "imatrix.chunk_count"
CHUNK_SIZE = "imatrix.chunk_size"

_MAX_ENTRIES = 1 << 17  # as many tensors as a GGUF may have
_MAX_COUNTS = 1 << 20  # experts of all entries; the largest mixtures have 60 layers of 512 with three tensors each
_MAX_VALUES = 1 << 26  # of one entry: 512 MiB as float64; the largest real ones have 7 million
_MAX_LEGACY_NAME = 1 << 10
_MAX_COUNT = 1 << 53
_FORK = (
    "Download or copy it again. If another program wrote it, let that convert it to llama.cpp's .dat or .gguf; or let one be "
    "made with --imatrix generate."
)


@dataclass(frozen=True)
class MatrixFile:
    """An imatrix and what kind of file it was read from."""

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

    ``exact`` also admits F64 sums with I64 counts: what our own checkpoints hold, and llama-quantize refuses.
    """
    try:
        with path.open("rb") as handle:
            magic = handle.read(4)
    except OSError as error:
        raise _bad(path, error.strerror or str(error), "Give the path of an imatrix file.") from error
    if magic == b"GGUF":
        return MatrixFile(path, "gguf", _read_gguf(path, exact=exact))
    if not magic.strip(b"\0"):
        raise _bad(path, "the file is empty or filled with zeros: an interrupted download or save left it")
    return MatrixFile(path, "dat", _read_dat(path))


def _bad(
    path: Path, why: str, todo: str = "Give another file, or let one be made with --imatrix generate."
) -> InvalidDataError:
    return InvalidDataError(f"{path} is not a usable imatrix", why, todo)


def _read_gguf(path: Path, *, exact: bool) -> Matrix:
    header = read_header(path)
    sums = {tensor.name[: -len(SUMS)]: tensor for tensor in header.tensors if tensor.name.endswith(SUMS)}
    counts = {tensor.name[: -len(COUNTS)]: tensor for tensor in header.tensors if tensor.name.endswith(COUNTS)}
    if not sums:
        kind = header.text("general.architecture")
        if header.text("general.type") == "imatrix" or CHUNK_COUNT in header.metadata:
            first = printable(header.tensors[0].name) if header.tensors else "no tensor at all"
            raise _bad(path, f"it calls itself an imatrix, but holds {first} where llama.cpp's have NAME{SUMS}", _FORK)
        raise _bad(path, f"it is a GGUF of model weights ({kind})" if kind else "it is a GGUF without imatrix data")
    if sums.keys() != counts.keys():
        odd = sorted(sums.keys() ^ counts.keys())[0]
        raise _bad(path, f"{odd} has sums without counts, or counts without sums")
    missing = [key for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE) if key not in header.metadata]
    if missing:
        raise _bad(path, f"the metadata key {missing[0]} is missing, and llama-quantize would refuse it")
    datasets = header.metadata[DATASETS]
    if not isinstance(datasets, (list, tuple)):
        raise _bad(path, f"{DATASETS} is not a list of names")
    if sum(tensor.n_elements for tensor in counts.values()) > _MAX_COUNTS:
        raise _bad(path, f"its entries have more than {_MAX_COUNTS} counts, and no model has so many experts")
    file = OpenFile(path)
    places = {name: _gguf_place(file, header, name, sums[name], counts[name], exact=exact) for name in sums}
    return Matrix(
        StoredEntries(file, places),
        _whole(path, header, CHUNK_SIZE),
        _whole(path, header, CHUNK_COUNT),
        tuple(printable(str(name)) for name in datasets),
    )


def _whole(path: Path, header: GgufHeader, key: str) -> int:
    value = header.metadata[key]
    if not isinstance(value, int) or not 0 <= value < 1 << 32:
        raise _bad(path, f"{key} is {value!r}, not a number of chunks or tokens")
    return value


def _gguf_place(file: OpenFile, header: GgufHeader, name: str, sums: TensorInfo, counts: TensorInfo, *, exact: bool) -> Place:
    kinds = (sums.type_name, counts.type_name)
    if kinds != ("F32", "F32") and not (exact and kinds == ("F64", "I64")):
        raise _bad(file.path, f"{name} is stored as {sums.type_name}, not F32", _FORK)
    n_mat = counts.n_elements
    if n_mat == 0 or sums.n_elements == 0 or sums.n_elements % n_mat:
        raise _bad(file.path, f"{name} has {sums.n_elements} sums for {n_mat} counts")
    _require_real(file.path, name, sums.n_elements)
    whole = kinds[1] == "I64"
    at = header.data_offset + counts.offset
    tokens = file.integers(at, n_mat) if whole else file.floats(at, n_mat)
    if not ((tokens >= -_MAX_COUNT) & (tokens <= _MAX_COUNT)).all():
        raise _bad(file.path, f"{name} has a count that is NaN, infinite or absurd")
    found = np.rint(tokens).astype(np.int64)
    return Place(header.data_offset + sums.offset, sums.n_elements // n_mat, found, "<f8" if whole else "<f4")


def _require_real(path: Path, name: str, n_values: int) -> None:
    """An entry is read whole; a file with holes can announce one larger than memory."""
    if n_values > _MAX_VALUES:
        raise _bad(path, f"{name} has {n_values} values, and no tensor has more than {_MAX_VALUES}")


class _Cursor:
    """Reads little-endian values one after the other, refusing every length that the file cannot hold."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self.at = file, 0

    def skip(self, size: int, what: str) -> int:
        """Step over ``size`` bytes and say where they begin."""
        if size < 0 or size > self.left:
            raise _bad(self._file.path, f"neither a GGUF nor a whole legacy imatrix: {what} does not fit the file's size")
        self.at += size
        return self.at - size

    def take(self, size: int, what: str) -> bytes:
        return self._file.read(self.skip(size, what), size)

    def integer(self, what: str) -> int:
        return int(struct.unpack("<i", self.take(4, what))[0])

    @property
    def left(self) -> int:
        return self._file.size - self.at


def _read_dat(path: Path) -> Matrix:
    """The legacy layout; what cannot be read is named by what it seems to be."""
    try:
        return _parse_dat(path)
    except InvalidDataError as error:
        with path.open("rb") as handle:
            head = handle.read(HEAD_BYTES)
        if is_legacy_imatrix(head):
            why = f"{error.why}; it was cut short, or a fork of llama.cpp wrote it in a layout of its own"
            raise _bad(path, why, _FORK) from error
        foreign = foreign_format(head, path.stat().st_size, path)
        if foreign.seems == UNKNOWN.seems:
            raise
        todo = [foreign.todo] if head.startswith(LFS_POINTER) else []
        raise _bad(path, f"neither a GGUF nor a legacy imatrix: it is {foreign.seems}", *todo) from error


def _parse_dat(path: Path) -> Matrix:
    """The legacy layout, little endian: i32 n; n times (i32 len, name, i32 ncall, i32 nval, f32[nval]); optionally
    i32 last_chunk, i32 len, dataset (llama.cpp ``common/imatrix-loader.cpp``). A value is (Σx²/count)*ncall, so the mean
    square is value/ncall: it is kept as sums with a count of ncall."""
    file = OpenFile(path)
    places: dict[str, Place] = {}
    cursor = _Cursor(file)
    n_entries = cursor.integer("the number of entries")
    if not 0 < n_entries <= min(_MAX_ENTRIES, file.size // 16):
        raise _bad(path, f"neither a GGUF nor a legacy imatrix: it would have {n_entries} entries")
    for index in range(n_entries):
        length = cursor.integer(f"the name of entry {index}")
        if not 0 < length <= _MAX_LEGACY_NAME:
            raise _bad(path, f"neither a GGUF nor a legacy imatrix: a name of {length} bytes")
        try:
            name = cursor.take(length, f"the name of entry {index}").decode("utf-8")
        except UnicodeDecodeError as error:
            raise _bad(path, "neither a GGUF nor a legacy imatrix: a tensor's name is not text") from error
        if not name.isprintable():
            raise _bad(path, "neither a GGUF nor a legacy imatrix: a tensor's name holds control characters")
        calls, n_values = cursor.integer(f"{name}'s calls"), cursor.integer(f"{name}'s size")
        if calls < 0 or n_values <= 0:
            raise _bad(path, f"{name} has {n_values} values from {calls} calls")
        _require_real(path, name, n_values)
        offset = cursor.skip(4 * n_values, f"{name}'s data")
        places[name] = Place(offset, n_values, np.array([max(calls, 1)], np.int64))
    chunks, datasets = 0, tuple[str, ...]()
    if cursor.left >= 4:
        chunks = cursor.integer("the chunk count")
        if chunks < 0:
            raise _bad(path, f"it would have seen {chunks} chunks")
        if cursor.left >= 4:
            length = cursor.integer("the dataset's name")
            dataset = cursor.take(length, "the dataset's name").decode("utf-8", "replace")
            datasets = (printable(dataset),) if dataset else ()
    return Matrix(StoredEntries(file, places), 0, chunks, datasets)


def write(matrix: Matrix, path: Path, kind: Format) -> None:
    """Write ``matrix`` in either format, atomically."""
    publish(prepare_gguf(matrix, path) if kind == "gguf" else _prepare_dat(matrix, path), path)


def write_gguf(matrix: Matrix, path: Path) -> None:
    """Write ``matrix`` as llama-imatrix does: keys ``imatrix.*``, per weight F32 ``.in_sum2`` and ``.counts``, names sorted."""
    publish(prepare_gguf(matrix, path), path)


def prepare_gguf(matrix: Matrix, path: Path, *, exact: bool = False, facts: Mapping[str, str] | None = None) -> Path:
    """Write what shall become ``path`` beside it, and say where; :func:`publish` gives it its name.

    ``exact``: F64 sums and I64 counts, for ourselves. ``facts`` are further metadata.
    """
    from gguf import GGUFWriter

    class Writer(GGUFWriter):
        def add_architecture(self) -> None:
            """An imatrix has none."""

    kinds = (np.dtype(np.float64), np.dtype(np.int64)) if exact else (np.dtype(np.float32), np.dtype(np.float32))
    with _growing(path) as part:
        writer = Writer(part, "")
        writer.add_type("imatrix")
        writer.add_array(DATASETS, list(matrix.datasets) or [""])  # llama-quantize wants the key, no list may be empty
        writer.add_uint32(CHUNK_COUNT, matrix.chunk_count)
        writer.add_uint32(CHUNK_SIZE, matrix.chunk_size)
        for key, value in (facts or {}).items():
            writer.add_string(key, value)
        for name in sorted(matrix.entries):
            if len((name + SUMS).encode()) > MAX_NAME:
                raise _not_written(f"the name {name} is longer than a GGUF imatrix can hold")
            n_mat, n_columns = matrix.shape(name)
            writer.add_tensor_info(name + SUMS, (n_mat, n_columns), kinds[0], kinds[0].itemsize * n_mat * n_columns)
            writer.add_tensor_info(name + COUNTS, (n_mat, 1), kinds[1], kinds[1].itemsize * n_mat)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name in sorted(matrix.entries):
                entry = matrix.entries[name]
                writer.write_tensor_data(entry.sums if exact else _float32(name, entry.sums))
                writer.write_tensor_data(entry.counts.astype(kinds[1]).reshape(-1, 1))
        finally:
            writer.close()
    return part


def _prepare_dat(matrix: Matrix, path: Path) -> Path:
    """Write the legacy layout beside ``path`` as llama-imatrix does: float32 ``value / count * ncall``, 1 for an expert
    without data, entries without any data left out."""
    size = matrix.chunk_size or 1
    names = [name for name in sorted(matrix.entries) if matrix.counts(name).any()]
    if not names:
        raise _not_written("not one of its entries counted a token, and a legacy file leaves such entries out")
    with _growing(path) as part, part.open("wb") as out:
        out.write(struct.pack("<i", len(names)))
        for name in names:
            entry = matrix.entries[name]
            calls = -(-int(entry.counts.max()) // size)
            counts = entry.counts.astype(np.float32).reshape(-1, 1)
            sums = _float32(name, entry.sums)
            values = np.where(counts == 0, np.float32(1), sums) / np.maximum(counts, np.float32(1))
            encoded = name.encode()
            out.write(struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, values.size))
            with np.errstate(over="ignore"):
                values *= np.float32(calls)
            out.write(_float32(name, values).astype("<f4").tobytes())
        dataset = (matrix.datasets[-1] if matrix.datasets else "").encode()
        out.write(struct.pack("<ii", matrix.chunk_count, len(dataset)) + dataset)
    return part


@contextmanager
def _growing(path: Path) -> Iterator[Path]:
    """Where what shall become ``path`` is written; on any trouble nothing stays there."""
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
    """``sums`` as files hold them; what llama-quantize would refuse is not written."""
    with np.errstate(over="ignore"):
        narrow = sums.astype(np.float32)
    if not np.isfinite(narrow).all():
        raise _not_written(f"{name} holds NaN, infinite values or sums beyond float32, and llama-quantize would refuse it")
    return narrow


def _not_written(why: str) -> InvalidDataError:
    return InvalidDataError("The imatrix was not written", why, "Check the inputs with: imatrix-runner imatrix stats FILE")
