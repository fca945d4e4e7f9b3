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
_BLOCK = 8 << 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_EDGE, _PIECE, _PIECES = 64 << 10, 4 << 10, 14
"""Bytes at a file's beginning (the header of a model), and how large and how many the pieces are that are sampled after it."""
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, getattr(errno, "ENOTSUP", errno.ENOSYS), getattr(errno, "EOPNOTSUPP", errno.ENOSYS))


def part_path(final: Path) -> Path:
    """Where a file that will be named ``final`` grows: beside it, so that the rename is atomic."""
    return final.with_name(f".{final.name}{PART}")


def sync(descriptor: int) -> None:
    """Force what was written to the disk, as far as its file system can do that: some answer that they cannot."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk, whoever wrote them."""
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
    """Give the complete and verified ``part`` its final name, durably."""
    try:
        sync_file(part)
        part.replace(final)
        sync_directory(final.parent)
    except OSError as error:
        raise from_os_error(error, f"giving {final.name} its name", final) from error


def discard(part: Path) -> None:
    """Remove an unfinished file, if it can be; why it was given up matters more than what becomes of it."""
    with suppress(OSError):
        part.unlink()


@contextmanager
def atomic_writer(final: Path) -> Iterator[IO[bytes]]:
    """Write ``final`` through a temporary sibling: on any error nothing appears and nothing stays behind."""
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
    """What tells quickly whether a file is still the one it was: size, time, inode, and a hash of samples of its content.

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
        """Whether two files have one size and equal samples: copies, as far as can be seen without reading them whole."""
        return bool(self.sample) and (self.size, self.sample) == (other.size, other.sample)


def stamp(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    status = path.stat()
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ino, _sample(path, status.st_size))


def changed_ns(path: Path) -> int:
    """When a file's content or status last changed. Programs cannot set this back, but renaming sets it, too."""
    return path.stat().st_ctime_ns


def _sample(path: Path, size: int) -> str:
    """A hash of the beginning, the end and pieces in between; of a small file, of all. Empty where it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    step = max(1, (size - _EDGE) // _PIECES)
    places = [(0, _EDGE), *((at, _PIECE) for at in range(_EDGE, size - _PIECE, step)), (max(0, size - _PIECE), _PIECE)]
    try:
        with path.open("rb", buffering=0) as handle:
            for at, length in places if size > _EDGE + _PIECES * _PIECE else [(0, size)]:
                handle.seek(at)
                digest.update(handle.read(length))
    except OSError:
        return ""  # a directory, or closed to us: whoever needs the content will say so
    return digest.hexdigest()


def sha256(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The hex SHA-256 of a file's content; ``on_bytes`` hears of every block (and may raise to stop)."""
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
    """``sha256:…`` of a file that lies in parts, from their hex hashes in order: of one, its own."""
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


def human_bytes(count: float) -> str:
    """``1536`` -> ``1.50 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def human_seconds(seconds: float) -> str:
    """``3725`` -> ``1:02:05``; under a minute ``4.2 s``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
