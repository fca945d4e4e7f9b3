"""The sums of a group of inputs on the disk, exact, from which an unfinished collection of covariances continues.

One line of JSON, then each input's sums in float64 as in memory, then the CRC-32 of all of them (u32); little endian.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import msgspec

from imatrix_runner.engines.covariance_jobs import WeightInput
from imatrix_runner.engines.files.covariance_file import MOST_COLUMNS, MOST_MATRICES
from imatrix_runner.engines.worker.collect.covariance_callback import InputSums
from imatrix_runner.files import atomic_writer, encode_json
from imatrix_runner.untrusted import UnreadableError, from_json

NAME = "unfinished.sums"

VERSION = 1

_MOST_HEAD = 64 << 20
_BLOCK = 8 << 20

_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]


class _Summed(msgspec.Struct, frozen=True):
    weights: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    columns: Annotated[int, msgspec.Meta(ge=1, le=MOST_COLUMNS)]
    counts: Annotated[tuple[_Count, ...], msgspec.Meta(min_length=1, max_length=MOST_MATRICES)]

    @property
    def input(self) -> WeightInput:
        return WeightInput(self.weights, self.columns, len(self.counts))


class _Head(msgspec.Struct, frozen=True):
    version: int
    fingerprint: str
    batches: _Count
    inputs: tuple[_Summed, ...]


@dataclass(frozen=True)
class Unfinished:
    """What a file holds: sums of ``inputs`` over the first ``batches`` batches of the job."""

    path: Path
    batches: int
    inputs: tuple[WeightInput, ...]

    def load(self, wanted: Sequence[WeightInput]) -> list[InputSums] | None:
        """Read the sums of some of the inputs; None if the file is damaged, for example by a loss of power."""
        found: dict[WeightInput, InputSums] = {}
        try:
            with self.path.open("rb") as handle:
                head = from_json(handle.readline(_MOST_HEAD), _Head)
                if head.batches != self.batches:
                    return None  # it was replaced
                crc = 0
                for summed in head.inputs:
                    into = InputSums.zero(summed.input) if summed.input in wanted else None
                    crc = _read(handle, summed.input.sum_bytes, into, crc)
                    if into is not None:
                        into.counts[:] = summed.counts
                        found[summed.input] = into
                if handle.read(4) != crc.to_bytes(4, "little"):
                    return None
        except (OSError, UnreadableError, EOFError):
            return None
        return [found[each] for each in wanted] if all(each in found for each in wanted) else None


def _read(handle: IO[bytes], size: int, into: InputSums | None, crc: int) -> int:
    """Read ``size`` bytes, into sums if there are any to read into; returns the checksum so far. Raises ``EOFError``."""
    target = into.sums.data.cast("B") if into is not None else None
    for begin in range(0, size, _BLOCK):
        data = handle.read(min(_BLOCK, size - begin))
        if len(data) != min(_BLOCK, size - begin):
            raise EOFError
        crc = zlib.crc32(data, crc)
        if target is not None:
            target[begin : begin + len(data)] = data
    return crc


def save_unfinished(path: Path, fingerprint: str, batches: int, sums: Sequence[InputSums]) -> None:
    """Write the sums after ``batches`` batches; the file appears whole under its name."""
    inputs = tuple(_Summed(each.input.weights, each.input.columns, tuple(each.counts.tolist())) for each in sums)
    with atomic_writer(path) as handle:
        handle.write(encode_json(_Head(VERSION, fingerprint, batches, inputs)) + b"\n")
        crc = 0
        for block in _blocks(sums):
            handle.write(block)
            crc = zlib.crc32(block, crc)
        handle.write(crc.to_bytes(4, "little"))


def _blocks(sums: Sequence[InputSums]) -> Iterator[memoryview]:
    for each in sums:
        data = each.sums.data.cast("B")
        for begin in range(0, len(data), _BLOCK):
            yield data[begin : begin + _BLOCK]


def find_unfinished(path: Path, fingerprint: str) -> Unfinished | None:
    """What a file holds; None if it is not there, of another ``fingerprint``, or has not the size that it should have."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            line = handle.readline(_MOST_HEAD)
        head = from_json(line, _Head)
    except (OSError, UnreadableError):
        return None
    expected = len(line) + sum(summed.input.sum_bytes for summed in head.inputs) + 4
    if (head.version, head.fingerprint, size) != (VERSION, fingerprint, expected):
        return None
    return Unfinished(path, head.batches, tuple(summed.input for summed in head.inputs))
