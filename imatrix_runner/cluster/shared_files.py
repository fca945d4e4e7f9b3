"""Files that a task needs, found on each machine: at the same path, in the hub's cache, or sent by the driver."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.errors import InvalidDataError, from_os_error

_SAMPLES = 64
_SAMPLE = 1 << 12
BLOCK = 32 << 20
"""Bytes that are sent at a time."""


class AbsentFileError(InvalidDataError):
    """A file of the driver's is not on this machine: the driver may send it."""

    def __init__(self, file: SharedFile, why: str = "") -> None:
        absent = "; ".join(filter(None, (f"there is no such file at {file.path}", why)))
        super().__init__(f"{file.path.name} is not on this machine", absent, "Send it.")
        self.file = file


@dataclass(frozen=True)
class SharedFile:
    """A file as the driver has it. ``digest``: of samples at places that ``nonce`` draws; another file of the same size would
    have to be equal in all of them. Files of one folder with one nonce (the shards of a model) stay together when they are
    sent."""

    path: Path
    size: int
    nonce: str
    digest: str

    @classmethod
    def of(cls, path: Path, nonce: str | None = None) -> SharedFile:
        """Raises :class:`~imatrix_runner.errors.RunnerError` if it cannot be read."""
        drawn = nonce if nonce is not None else secrets.token_hex(16)
        try:
            size = path.stat().st_size
            return cls(path.absolute(), size, drawn, _sampled(path, size, drawn))
        except OSError as error:
            raise from_os_error(error, f"reading {path.name}", path) from error

    def is_at(self, path: Path) -> bool:
        """Whether the same file is at ``path`` on this machine."""
        try:
            return path.stat().st_size == self.size and _sampled(path, self.size, self.nonce) == self.digest
        except OSError:
            return False

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """The content in blocks, each with its place."""
        with self.path.open("rb", buffering=0) as handle:
            for place in range(0, max(self.size, 1), BLOCK):
                yield place, handle.read(BLOCK)


def shared_files(paths: Sequence[Path]) -> tuple[SharedFile, ...]:
    """Files of one folder, which stay together. Raises :class:`~imatrix_runner.errors.RunnerError` if one cannot be read."""
    nonce = secrets.token_hex(16)
    return tuple(SharedFile.of(path, nonce) for path in paths)


def _sampled(path: Path, size: int, nonce: str) -> str:
    digest = hashlib.blake2b(nonce.encode(), digest_size=16)
    with path.open("rb", buffering=0) as handle:
        if size <= _SAMPLES * _SAMPLE:
            digest.update(handle.read())
            return digest.hexdigest()
        for number in range(_SAMPLES):
            drawn = hashlib.blake2b(f"{nonce} {number}".encode(), digest_size=8).digest()
            handle.seek(int.from_bytes(drawn, "little") % (size - _SAMPLE))
            digest.update(handle.read(_SAMPLE))
    return digest.hexdigest()
