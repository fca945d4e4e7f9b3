"""Unpacks untrusted tar and zip archives without leaving the destination or filling the disk."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, cast

from imatrix_runner.errors import from_os_error

MAX_BYTES = 12 << 30
MAX_MEMBERS = 100_000
_BLOCK = 1 << 20
_MAX_HEADER = 4 << 20
_OPENERS: Mapping[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": lambda path: cast("IO[bytes]", gzip.open(path)),  # noqa: SIM115 - closed by who opens
    b"BZh": lambda path: cast("IO[bytes]", bz2.open(path)),  # noqa: SIM115 - closed by who opens
    b"\xfd7zXZ": lambda path: cast("IO[bytes]", lzma.open(path)),  # noqa: SIM115 - closed by who opens
}
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError)


class ArchiveError(Exception):
    """An archive is damaged or tries something that is not allowed; the text is one plain phrase."""


def unpack(
    archive: Path,
    into: Path,
    *,
    check: Callable[[], None] = lambda: None,
    max_bytes: int = MAX_BYTES,
    max_members: int = MAX_MEMBERS,
) -> None:
    """Unpack ``archive`` (tar with any compression, or zip) into the existing directory ``into``.

    ``check`` is called between members and may raise to stop. Raises :class:`ArchiveError`; what was unpacked before stays
    in ``into``, for the caller to remove.
    """
    try:
        if zipfile.is_zipfile(archive):
            _unpack_zip(archive, into, _Budget(max_bytes, max_members), check)
        else:
            _unpack_tar(archive, into, _Budget(max_bytes, max_members), check)
    except _DAMAGED as error:
        raise ArchiveError(f"it is damaged or cut short ({error})") from error
    except OSError as error:
        if error.errno is None:  # gzip reports bad data as a bare OSError
            raise ArchiveError(f"it is damaged or cut short ({error})") from error
        raise from_os_error(error, f"unpacking {archive.name}", into) from error


class _Budget:
    def __init__(self, max_bytes: int, max_members: int) -> None:
        self._bytes, self._members = max_bytes, max_members

    def spend(self, size: int) -> None:
        self._bytes -= size
        self._members -= 1
        if self._bytes < 0 or self._members < 0:
            raise ArchiveError("it unpacks to more than any llama.cpp archive holds")


def safe_path(name: str) -> PurePosixPath:
    """Return a member's name as a path below the destination. Raises :class:`ArchiveError` for any other."""
    path = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or ":" in name or path.is_absolute() or ".." in path.parts:
        raise ArchiveError(f"its member {name!r} would be written outside the destination")
    return path


def _safe_link(path: PurePosixPath, target: str) -> None:
    """Refuse a symbolic link that could lead out: ``..`` may only come first, and never climb above the destination."""
    parts = PurePosixPath(target).parts
    ups = len([part for part in parts if part == ".."])
    climbs_later = ".." in parts[ups:]
    if not target or "\\" in target or target.startswith("/") or climbs_later or ups > len(path.parts) - 1:
        raise ArchiveError(f"its link {str(path)!r} leads outside the destination, to {target!r}")


@contextmanager
def opened_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive with any compression. At most :data:`_MAX_HEADER` bytes of its headers are read at once: tarfile reads a
    long name or extended header whole, and a few compressed kilobytes can announce gigabytes."""
    with archive.open("rb") as head:
        magic = head.read(6)
    opener = next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)
    with (
        opener(archive) if opener is not None else archive.open("rb") as stream,
        tarfile.open(fileobj=cast("IO[bytes]", _ShortReads(stream)), mode="r:") as tar,
    ):
        yield tar


class _ShortReads:
    """A stream that refuses to read much at once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.tell, self.seek = stream.tell, stream.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise ArchiveError(f"one of its headers has more than {_MAX_HEADER} bytes")
        return self._stream.read(size)


def _unpack_tar(archive: Path, into: Path, budget: _Budget, check: Callable[[], None]) -> None:
    links: set[PurePosixPath] = set()
    with opened_tar(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extraction_filter = tarfile.data_filter
        for member in tar:
            check()
            path = safe_path(member.name)
            budget.spend(member.size)  # of any kind: its bytes are read to skip them
            if links.intersection(path.parents):
                raise ArchiveError(f"its member {member.name!r} would be written through a link")
            if member.issym():
                _safe_link(path, member.linkname)
                links.add(path)
            elif member.islnk():
                linked = safe_path(member.linkname)
                if links.intersection((linked, *linked.parents)):
                    raise ArchiveError(f"its member {member.name!r} would be written through a link")
            elif not (member.isreg() or member.isdir()):
                raise ArchiveError(f"its member {member.name!r} is neither a file, a directory nor a link")
            tar.extract(member, into)


def _unpack_zip(archive: Path, into: Path, budget: _Budget, check: Callable[[], None]) -> None:
    with zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            check()
            path = into / safe_path(member.filename)
            if (member.external_attr >> 16) & 0o170000 == 0o120000:
                raise ArchiveError(f"its member {member.filename!r} is a link")
            if member.is_dir():
                budget.spend(0)
                path.mkdir(parents=True, exist_ok=True)
                continue
            budget.spend(member.file_size)
            path.parent.mkdir(parents=True, exist_ok=True)
            with packed.open(member) as source, path.open("wb") as target:
                _copy_exactly(source, target, member.file_size)
            if (member.external_attr >> 16) & 0o111:
                path.chmod(0o755)


def _copy_exactly(source: IO[bytes], target: IO[bytes], size: int) -> None:
    # The size is what the archive claims, so the copy checks it.
    while block := source.read(_BLOCK):
        size -= len(block)
        if size < 0:
            raise ArchiveError("a member is larger than the archive says")
        target.write(block)
