"""The file that an unfinished collection continues from: the exact sum so far, and everything the next step depends on.

A GGUF like an imatrix, with F64 sums and I64 counts, and as further metadata the state as JSON: what it was made from, which
ranges are in it, the perplexity's sums, the curve of convergence. It is replaced as a whole after every range, so a kill
leaves the old one or the new one, and the same command decides from it alone what comes next. A checksum at its end detects
damage by a disk or a crash.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from imatrix_runner.engines.jobs import ChunkRange, CollectedRange, Perplexity
from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.files import discard
from imatrix_runner.imatrix.chunks import count_chunks
from imatrix_runner.imatrix.convergence import Point
from imatrix_runner.imatrix.formats import prepare_gguf, read
from imatrix_runner.imatrix.matrix import Counts, Entries, Matrix, MatrixEntry, add
from imatrix_runner.journal import describe_changes
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.untrusted import UnreadableError, from_json

_VERSION = 1
_STATE = "imatrix_runner.checkpoint"
_TAIL = struct.Struct("<12sI")
_MARK = b"imatrix crc\n"


@dataclass(frozen=True)
class Checkpoint:
    """The sum of the ranges ``done``, in that order; ``matrix`` is None before the first.

    ``inputs`` are the named fingerprints of everything it depends on. ``seconds`` of computing, of which ``load_seconds``
    went into loading the model. ``processors``: features of those that computed the ranges, each once, as far as known.
    """

    inputs: Mapping[str, str]
    done: tuple[ChunkRange, ...] = ()
    perplexity: Perplexity = field(default_factory=Perplexity)
    seconds: float = 0.0
    load_seconds: float = 0.0
    curve: tuple[Point, ...] = ()
    matrix: Matrix | None = None
    processors: tuple[str, ...] = ()

    @property
    def chunks(self) -> int:
        return count_chunks(self.done)

    def with_range(self, finished: CollectedRange, matrix: Matrix, point: Point | None) -> Checkpoint:
        """Return the checkpoint with one more range. The entries are lazy: nothing is read or added yet."""
        total = matrix if self.matrix is None else add([self.matrix, matrix])
        # As llama-imatrix counts them: the most tokens that any row saw.
        chunks = max(int(total.counts(name).max()) for name in total.entries) // total.chunk_size
        return replace(
            self,
            done=(*self.done, finished.chunks),
            perplexity=self.perplexity + finished.perplexity,
            seconds=self.seconds + finished.seconds,
            load_seconds=self.load_seconds + finished.load_seconds,
            curve=(*self.curve, point) if point is not None else self.curve,
            matrix=replace(total, chunk_count=chunks),
            processors=tuple(sorted({*self.processors, finished.processor} - {""})),
        )


class _State(msgspec.Struct, frozen=True):
    """A checkpoint's metadata as it is stored."""

    version: int
    inputs: dict[str, str]
    done: list[tuple[int, int]]
    perplexity: Perplexity
    seconds: float
    load_seconds: float
    curve: list[Point]
    processors: list[str] = []


def prepare(checkpoint: Checkpoint, path: Path) -> Path:
    """Write the new ``path`` under its temporary name, reading and adding one entry at a time; return that name."""
    assert checkpoint.matrix is not None
    state = _State(
        _VERSION,
        dict(checkpoint.inputs),
        [(chunks.first, chunks.count) for chunks in checkpoint.done],
        checkpoint.perplexity,
        checkpoint.seconds,
        checkpoint.load_seconds,
        list(checkpoint.curve),
        list(checkpoint.processors),
    )
    text = msgspec.json.encode(state).decode()
    summed = _Checked(checkpoint.matrix.entries, checkpoint.matrix)
    part = prepare_gguf(replace(checkpoint.matrix, entries=summed), path, exact=True, facts={_STATE: text})
    try:
        with part.open("ab") as handle:
            handle.write(_TAIL.pack(_MARK, summed.checksum(text)))
    except OSError as error:
        discard(part)
        raise from_os_error(error, f"writing {path.name}", path) from error
    return part


def load(path: Path) -> Checkpoint:
    """Read a checkpoint back. Raises :class:`InvalidDataError` unless it is whole, to the last bit."""
    header = read_header(path)
    text = header.metadata.get(_STATE)
    if not isinstance(text, str):
        raise _unusable(path, "it is not a checkpoint of this program")
    try:
        state = from_json(text, _State)
    except UnreadableError as error:
        raise _unusable(path, f"its state cannot be read: {error}") from error
    if state.version != _VERSION:
        raise _unusable(path, f"it was written by another version ({state.version}, this is {_VERSION})")
    matrix = read(path, exact=True).matrix
    summed = _Checked(matrix.entries, matrix)
    for name in summed:
        summed[name]
    with path.open("rb") as handle:
        handle.seek(-_TAIL.size, 2)
        mark, checksum = _TAIL.unpack(handle.read(_TAIL.size))
    if mark != _MARK or checksum != summed.checksum(text):
        raise _unusable(path, "its checksum is wrong: a disk or a crash has damaged it")
    return Checkpoint(
        state.inputs,
        tuple(ChunkRange(first, count) for first, count in state.done),
        state.perplexity,
        state.seconds,
        state.load_seconds,
        tuple(state.curve),
        matrix,
        tuple(state.processors),
    )


def resume(path: Path, inputs: Mapping[str, str], ranges: Sequence[ChunkRange]) -> tuple[Checkpoint, str]:
    """Return the checkpoint to continue from, and why an existing one cannot be used (empty if it is used, or there is
    none)."""
    fresh = Checkpoint(inputs)
    if not path.exists():
        return fresh, ""
    try:
        found = load(path)
    except InvalidDataError as error:
        return fresh, error.why
    if changes := describe_changes(found.inputs, inputs):
        return fresh, "changed: " + "; ".join(changes)
    if found.done != tuple(ranges[: len(found.done)]):
        return fresh, "this version cuts the text into other ranges"
    return found, ""


def fingerprint(inputs: Mapping[str, str]) -> str:
    """Return one fingerprint of all inputs, for an engine's own unfinished files."""
    return hashlib.sha256(json.dumps(dict(inputs), sort_keys=True).encode()).hexdigest()


def _unusable(path: Path, why: str) -> InvalidDataError:
    return InvalidDataError(f"{path} cannot be continued", why, "Run the same command again: it starts from the beginning.")


class _Checked(Entries):
    """Entries that add their content to a checksum as they are looked up, in the order of names."""

    def __init__(self, entries: Mapping[str, MatrixEntry], matrix: Matrix) -> None:
        self._entries, self._matrix = entries, matrix
        self._checksum = 0

    def checksum(self, state: str) -> int:
        return zlib.crc32(state.encode(), self._checksum)

    def __getitem__(self, name: str) -> MatrixEntry:
        entry = self._entries[name]
        self._checksum = zlib.crc32(name.encode(), self._checksum)
        for numbers in (entry.sums.astype("<f8", copy=False), entry.counts.astype("<i8", copy=False)):
            self._checksum = zlib.crc32(np.ascontiguousarray(numbers).data.cast("B"), self._checksum)
        return entry

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, int]:
        return self._matrix.shape(name)

    def counts(self, name: str) -> Counts:
        return self._matrix.counts(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
