"""Files: written whole or not at all, recognised by content, and never more than the disk holds."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import msgspec

from imatrix_runner.errors import InvalidDataError, NoSpaceError, from_os_error
from imatrix_runner.untrusted import UnreadableError, from_json

T = TypeVar("T")

PART = ".part"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SIZE = re.compile(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*(?:([kmgt])(?:i?b)?|(b))?\s*", re.IGNORECASE)
_LEAST_BARE = 1 << 20  # no memory, disk or model is smaller
_BLOCK = 8 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_EDGE, _SAMPLE, _SAMPLES = 64 << 10, 4 << 10, 14
"""Bytes sampled at a file's beginning (a model's header), and the size and number of the blocks sampled after it."""
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, getattr(errno, "ENOTSUP", errno.ENOSYS), getattr(errno, "EOPNOTSUPP", errno.ENOSYS))


def part_path(final: Path) -> Path:
    """Return where ``final`` is written until it is complete: in the same directory, so that the rename is atomic."""
    return final.with_name(f".{final.name}{PART}")


def sync(descriptor: int) -> None:
    """Flush written data to the disk; does nothing on file systems that do not support it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def open_to_continue(path: Path, doing: str) -> IO[bytes]:
    """Open a file to read what is in it and write on; an empty one where there is none. Raises what :func:`from_os_error` makes
    of the trouble met while ``doing`` it (a gerund phrase)."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise from_os_error(error, doing, path) from error


def open_to_overwrite(path: Path) -> IO[bytes]:
    """Open an existing file to write into it at any place, while other machines write elsewhere in it. Raises ``OSError``.

    Not for reading: a network file system's client may send a page back whole that it has read, and so undo what another
    machine has written to its rest.
    """
    return open(path, "wb", buffering=0, opener=lambda name, _flags: os.open(name, os.O_WRONLY | getattr(os, "O_BINARY", 0)))


def sync_file(path: Path) -> None:
    """Flush a file's bytes to the disk, also those that another process wrote."""
    # Windows flushes only through a handle that may write.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make renames inside ``path`` durable; a no-op where directories cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def publish(part: Path, final: Path) -> None:
    """Give the complete and verified ``part`` its final name, durably. The folder is made where it is missing."""
    try:
        if not final.parent.is_dir():
            final.parent.mkdir(parents=True)
            sync_directory(final.parent.parent)
        sync_file(part)
        part.replace(final)
        sync_directory(final.parent)
    except OSError as error:
        raise from_os_error(error, f"giving {final.name} its name", final) from error


def remove_empty(removed: Path, root: Path) -> None:
    """Remove the folder of a removed file if that is below ``root`` and holds nothing else."""
    folder = removed.parent
    if folder != root and folder.is_relative_to(root):
        with suppress(OSError):  # not empty
            folder.rmdir()


def discard(part: Path) -> None:
    """Remove an unfinished file. Errors are ignored, because the error that led here matters more."""
    with suppress(OSError):
        part.unlink()


@contextmanager
def atomic_writer(final: Path) -> Iterator[IO[bytes]]:
    """Write ``final`` through a temporary sibling: on any error ``final`` stays as it was and the sibling is removed."""
    part = part_path(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as handle:
            yield handle
            handle.flush()
            sync(handle.fileno())
        part.replace(final)
        sync_directory(final.parent)
    except OSError as error:
        discard(part)
        raise from_os_error(error, f"writing {final.name}", final) from error
    except BaseException:
        discard(part)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a dataclass, struct or plain value as indented JSON, atomically."""
    with atomic_writer(path) as handle:
        handle.write(msgspec.json.format(encode_json(value), indent=2) + b"\n")


def encode_json(value: Any, order: Literal["deterministic"] | None = None) -> bytes:
    """A dataclass, struct or plain value as JSON. Raises :class:`InvalidDataError` for a name that is not UTF-8.

    ``order``: "deterministic" sorts the keys of dictionaries and sets.
    """
    try:
        return msgspec.json.encode(value, order=order)
    except UnicodeEncodeError as error:
        raise not_utf8(str(error.object)) from error


def readable(text: str) -> str:
    """A text with ``\\xe9`` for every byte that is not UTF-8."""
    return _SURROGATE.sub(lambda found: f"\\x{ord(found[0]) & 0xFF:02x}", text)


def not_utf8(name: str) -> InvalidDataError:
    """The error for a file name, or another text, that holds bytes which are not UTF-8."""
    return InvalidDataError(
        f"The name {readable(name)} is not UTF-8",
        "GGUF, JSON and reports hold names as UTF-8, and this one could not be written into them",
        "Rename the file or folder, then run the same command again.",
    )


def read_json(path: Path, kind: type[T], *, limit: int = 64 << 20) -> T:
    """Read JSON of a known shape; anything else is an :class:`InvalidDataError` that names the file."""
    try:
        if path.stat().st_size > limit:
            raise InvalidDataError(f"{path} is too large", f"more than {limit} bytes of JSON", "Move it away and try again.")
        return from_json(path.read_bytes(), kind)
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}", path) from error
    except UnreadableError as error:
        raise InvalidDataError(f"{path} cannot be read", str(error), "Move it away: it will be made again.") from error


@dataclass(frozen=True, eq=False)
class Stamp:
    """A quick check of whether a file is unchanged: size, time, inode, and a hash of samples of its content.

    Times can be set back (``cp -p``, ``rsync``, ``touch -r``), samples cannot. Stamps of earlier versions have no ``sample``;
    two stamps are equal if they agree in everything that both have.
    """

    size: int
    mtime_ns: int
    inode: int
    sample: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stamp):
            return NotImplemented
        known = not self.sample or not other.sample or self.sample == other.sample
        return known and (self.size, self.mtime_ns, self.inode) == (other.size, other.mtime_ns, other.inode)

    def __hash__(self) -> int:
        return hash((self.size, self.mtime_ns, self.inode))

    def same_content(self, other: Stamp) -> bool:
        """Whether two files have the same size and equal samples, so that they are probably copies."""
        return bool(self.sample) and (self.size, self.sample) == (other.size, other.sample)


def stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino, _sample(path, status.st_size))


def changed_ns(path: Path) -> int:
    """When a file's content or status last changed. Programs cannot set this back, but renaming sets it, too."""
    return path.stat().st_ctime_ns


def _sample(path: Path, size: int) -> str:
    """Return a hash of the beginning, the end and blocks in between, or of a whole small file; empty if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    step = max(1, (size - _EDGE) // _SAMPLES)
    places = [(0, _EDGE), *((at, _SAMPLE) for at in range(_EDGE, size - _SAMPLE, step)), (max(0, size - _SAMPLE), _SAMPLE)]
    try:
        with path.open("rb", buffering=0) as handle:
            for at, length in places if size > _EDGE + _SAMPLES * _SAMPLE else [(0, size)]:
                handle.seek(at)
                digest.update(handle.read(length))
    except OSError:
        return ""  # a directory, or not readable: code that needs the content reports that
    return digest.hexdigest()


def sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The hex SHA-256 of a file's content; ``on_bytes`` is called with the size of every block, and may raise to stop."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as handle:
            while block := handle.read(_BLOCK):
                digest.update(block)
                if on_bytes is not None:
                    on_bytes(len(block))
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}", path) from error
    return digest.hexdigest()


def joint_sha256(hashes: Sequence[str]) -> str:
    """Return ``sha256:…`` of a file split into parts, from their hex hashes in order; of a single part, its own hash."""
    return f"sha256:{hashes[0] if len(hashes) == 1 else hashlib.sha256(''.join(hashes).encode()).hexdigest()}"


def existing_parent(path: Path) -> Path:
    """The nearest directory at or above ``path`` that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes an ordinary user may still write on the file system that holds, or will hold, ``path``."""
    return shutil.disk_usage(existing_parent(path)).free


def require_space(path: Path, need: int, what: str) -> None:
    """Raise :class:`NoSpaceError` unless ``need`` bytes fit where ``path`` is or will be."""
    free = free_bytes(path)
    if need > free:
        raise NoSpaceError(
            f"Not enough disk space for {what}",
            f"{human_bytes(need)} needed, {human_bytes(free)} free at {existing_parent(path)}",
            "Free some space, ask for fewer levels, or choose another disk with --work-dir.",
        )


def byte_unit(count: float) -> tuple[str, int]:
    """Return the unit to show a number of bytes in, and its size in bytes: ``1536`` -> ``KiB``, 1024."""
    power = next((power for power in range(len(_UNITS)) if abs(count) < 1024 ** (power + 1)), len(_UNITS) - 1)
    return _UNITS[power], 1024**power


def human_bytes(count: float) -> str:
    """``1536`` -> ``1.50 KiB``."""
    unit, size = byte_unit(count)
    return f"{count:.0f} {unit}" if size == 1 else f"{count / size:.2f} {unit}"


def exact_bytes(count: int) -> str:
    """A text from which :func:`parse_bytes` reads the same number: ``4GiB``, ``1.5MiB``; in bytes if it takes many digits."""
    unit, size = byte_unit(count)
    texts = (f"{count / size:.{digits}f}{unit}" for digits in range(4))
    return next((text for text in texts if parse_bytes(text) == count), f"{count}B")


def parse_bytes(text: str) -> int:
    """Read a number of bytes with a unit: ``4GiB``, ``500MB``, ``1.5g``; with or without the i, K is 1024, as in ``df -h``.

    Numbers without a unit are bytes, and must be at least a mebibyte: ``8`` is likely meant as 8 GiB. Raises ValueError, with
    the reason as its text, for what is not a size.
    """
    match = _SIZE.fullmatch(text)
    n_bytes = int(float(match[1]) * 1024 ** " kmgt".index((match[2] or " ").lower())) if match else 0
    if match is None or n_bytes < 1:
        raise ValueError(f"{text!r} is not a size such as 4GiB or 500MiB")
    if match[2] is None and match[3] is None and n_bytes < _LEAST_BARE:
        raise ValueError(f"{text!r} has no unit and would mean bytes; for GiB, write {match[1]}GiB")
    return n_bytes


def human_seconds(seconds: float) -> str:
    """``3725`` -> ``1:02:05``; under a minute ``4.2 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
