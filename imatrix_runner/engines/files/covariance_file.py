"""Covariances of weights' inputs: for each distinct input a file with the mean of x x^T over the tokens that it was seen with.

A file is one line of JSON (:class:`CovarianceHead`), then for each matrix (expert) the upper triangle row by row in float32
(row i holds columns i .. n - 1), then for each matrix the CRC-32 of its triangle (u32); little endian. A matrix that saw no
token is zero. ``covariances.json`` (:class:`CovarianceIndex`), written last, lists all files of a finished set.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from imatrix_runner.engines.covariance_jobs import triangle
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.files import atomic_writer, encode_json, write_json
from imatrix_runner.untrusted import UnreadableError, from_json

VERSION = 1

SUFFIX = ".covariance"

INDEX = "covariances.json"

MOST_COLUMNS = 1 << 20
"""Upper bound for the numbers of a token's input."""

MOST_MATRICES = 1 << 14

_MOST_HEAD = 1 << 20
_MOST_INDEX = 64 << 20
_BLOCK = 1 << 20  # elements that are divided and written at a time
_TURNED = 256  # rows and columns that are mirrored at a time

Matrix32 = npt.NDArray[np.float32]

Sums64 = npt.NDArray[np.float64]

_Columns = Annotated[int, msgspec.Meta(ge=1, le=MOST_COLUMNS)]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
_TokensOfEach = Annotated[tuple[_Tokens, ...], msgspec.Meta(min_length=1, max_length=MOST_MATRICES)]


class CovarianceHead(msgspec.Struct, frozen=True):
    """What a file holds: the covariance of an input with ``columns`` numbers a token that ``weights`` read, in the order of
    computation; ``tokens`` of each matrix."""

    version: int
    fingerprint: str
    weights: tuple[str, ...]
    columns: _Columns
    tokens: _TokensOfEach


class _Listed(msgspec.Struct, frozen=True):
    file: str
    weights: tuple[str, ...]
    columns: _Columns
    tokens: _TokensOfEach


class CovarianceIndex(msgspec.Struct, frozen=True):
    """All files of a finished set."""

    version: int
    fingerprint: str
    files: tuple[_Listed, ...]


@dataclass(frozen=True)
class StoredCovariance:
    """A file: the input of ``weights``, ``columns`` wide, over ``tokens`` of each matrix (expert)."""

    path: Path
    weights: tuple[str, ...]
    columns: int
    tokens: tuple[int, ...]

    @property
    def matrices(self) -> int:
        return len(self.tokens)


def file_name(number: int) -> str:
    """The name of the file of an input, by its number in the order of computation: ``000012.covariance``."""
    return f"{number:06d}{SUFFIX}"


def write_covariance(path: Path, head: CovarianceHead, sums: Callable[[int], Sums64]) -> None:
    """Write a file; it appears whole under its name. ``sums(m)``: float64 [triangle(columns)], the sums of x x^T over the
    tokens of matrix ``m``; the mean is written."""
    crcs = np.zeros(len(head.tokens), "<u4")
    with atomic_writer(path) as handle:
        handle.write(encode_json(head) + b"\n")
        for index, tokens in enumerate(head.tokens):
            summed, crc = sums(index), 0
            for begin in range(0, len(summed), _BLOCK):
                mean = (summed[begin : begin + _BLOCK] / max(1, tokens)).astype("<f4")
                crc = zlib.crc32(mean.data, crc)
                handle.write(mean.data)
            crcs[index] = crc
        handle.write(crcs.tobytes())


def read_covariance_head(path: Path) -> CovarianceHead:
    """The head of a file. Raises :class:`InvalidDataError` if it is of another kind, damaged or torn."""
    return _read_head(path)[0]


def read_covariance(path: Path, matrix: int = 0) -> Matrix32:
    """float32 [n, n]: the whole symmetric covariance of one matrix (expert). Raises :class:`InvalidDataError` if the file is
    damaged."""
    head, start = _read_head(path)
    n, count = head.columns, triangle(head.columns)
    if not 0 <= matrix < len(head.tokens):
        raise _damaged(path, f"it has {len(head.tokens)} matrices, and number {matrix} is wanted")
    try:
        half = np.fromfile(path, "<f4", count, offset=start + 4 * count * matrix)
        crcs = np.fromfile(path, "<u4", len(head.tokens), offset=start + 4 * count * len(head.tokens))
    except OSError as error:
        raise from_os_error(error, "reading a covariance", path) from error
    if len(half) != count or len(crcs) != len(head.tokens):
        raise _damaged(path, "it became shorter while it was read")
    if zlib.crc32(half.data) != crcs[matrix]:
        raise _damaged(path, f"the checksum of matrix {matrix} is wrong")
    if not np.isfinite(half).all():
        raise _damaged(path, f"matrix {matrix} has NaN or infinite numbers")
    return _whole(half, n)


def _whole(half: Matrix32, n: int) -> Matrix32:
    """float32 [n, n] from its upper triangle, row by row."""
    whole = np.empty((n, n), np.float32)
    begin = 0
    for row in range(n):
        whole[row, row:] = half[begin : begin + n - row]
        begin += n - row
    for top in range(0, n, _TURNED):
        rows = slice(top, top + _TURNED)
        corner = whole[rows, rows]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T
        for left in range(top + _TURNED, n, _TURNED):
            columns = slice(left, left + _TURNED)
            whole[columns, rows] = whole[rows, columns].T
    return whole


def _read_head(path: Path) -> tuple[CovarianceHead, int]:
    """The head, and the offset of the first triangle."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            line = handle.readline(_MOST_HEAD)
    except OSError as error:
        raise from_os_error(error, "reading a covariance", path) from error
    try:
        if not line.endswith(b"\n"):
            raise UnreadableError("its first line does not end")
        head = from_json(line, CovarianceHead)
    except UnreadableError as error:
        raise _damaged(path, str(error)) from error
    if head.version != VERSION:
        raise _damaged(path, f"its version is {head.version}, and this program reads {VERSION}")
    expected = len(line) + len(head.tokens) * 4 * (triangle(head.columns) + 1)
    if size != expected:
        raise _damaged(path, f"it would take {expected} bytes, and has {size}")
    return head, len(line)


def write_covariance_index(folder: Path, fingerprint: str, heads: Mapping[str, CovarianceHead]) -> None:
    """List the files of a finished set; ``heads`` by file name."""
    listed = tuple(_Listed(name, head.weights, head.columns, head.tokens) for name, head in heads.items())
    write_json(folder / INDEX, CovarianceIndex(VERSION, fingerprint, listed))


def stored_covariances(folder: Path, fingerprint: str | None = None) -> dict[str, StoredCovariance]:
    """Weight -> its input's covariance, of a finished set in ``folder`` whose files are all there; empty if there is none, or
    (if it is given) of another ``fingerprint``."""
    index = _read_index(folder / INDEX)
    if index is None or index.version != VERSION or fingerprint not in (None, index.fingerprint):
        return {}
    found: dict[str, StoredCovariance] = {}
    for listed in index.files:
        path = folder / listed.file
        if path.name != listed.file or not listed.file.endswith(SUFFIX):
            return {}  # a name that leads out of the folder
        try:
            head = read_covariance_head(path)
        except InvalidDataError:
            return {}
        wanted = (index.fingerprint, listed.weights, listed.columns, listed.tokens)
        if (head.fingerprint, head.weights, head.columns, head.tokens) != wanted:
            return {}
        found |= dict.fromkeys(head.weights, StoredCovariance(path, head.weights, head.columns, head.tokens))
    return found


def set_fingerprint(folder: Path) -> str:
    """The fingerprint of the finished set in ``folder``; empty if there is none."""
    index = _read_index(folder / INDEX)
    return index.fingerprint if index is not None else ""


def _read_index(path: Path) -> CovarianceIndex | None:
    try:
        if path.stat().st_size > _MOST_INDEX:
            return None
        return from_json(path.read_bytes(), CovarianceIndex)
    except (OSError, UnreadableError):
        return None


def remove_others(folder: Path, fingerprint: str) -> None:
    """Remove the files of sets with another ``fingerprint``, damaged ones, and half-written files that a kill left."""
    try:
        if set_fingerprint(folder) != fingerprint:
            (folder / INDEX).unlink(missing_ok=True)
        for path in (*folder.glob(f"*{SUFFIX}"), *folder.glob(".*.part")):
            if not (path.name.endswith(SUFFIX) and _belongs(path, fingerprint)):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, "removing covariances of another model or text", folder) from error


def _belongs(path: Path, fingerprint: str) -> bool:
    try:
        return read_covariance_head(path).fingerprint == fingerprint
    except InvalidDataError:
        return False


def _damaged(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"The covariance {path} cannot be used", why, "Remove its folder: covariances are collected again from the model."
    )
