"""Content hashes of a source's files; they are remembered, so a second run reads nothing."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Finished, Progress, Sink, Started, ignore
from imatrix_runner.files import human_bytes, joint_sha256, sha256, stamp
from imatrix_runner.journal import Journal
from imatrix_runner.models.safetensors_file import check_safetensors
from imatrix_runner.signals import Stop

_QUICK_BYTES = 64 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OTHER_WEIGHTS = frozenset((".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"))


@dataclass(frozen=True)
class Hasher:
    """Hashes files, or takes their hashes from ``journal`` where the files are unchanged. With ``keep`` new ones are
    remembered there."""

    journal: Journal
    sink: Sink
    stop: Stop
    keep: bool

    def __call__(self, files: Sequence[Path]) -> list[str]:
        """Return the hex SHA-256 of each file, showing progress where it takes a while.

        Raises :class:`InvalidDataError` for a damaged file of a hub's cache.
        """
        known = {path: self.journal.known_hash(path) for path in files}
        todo = sum(path.stat().st_size for path, value in known.items() if value is None)
        emit = self.sink if todo > _QUICK_BYTES else ignore
        emit(Started("fingerprint", f"fingerprint of {human_bytes(todo)}", todo, "B"))
        done = 0

        def count(n_bytes: int) -> None:
            nonlocal done
            self.stop.check()
            done += n_bytes
            emit(Progress("fingerprint", done, todo))

        for path in [path for path, value in known.items() if value is None]:
            at = stamp(path)
            known[path] = sha256(path, count)
            _check_cached(path, known[path] or "")
            if self.keep:
                self.journal.remember_hash(path, at, known[path] or "")
        emit(Finished("fingerprint", "done"))
        return [known[path] or "" for path in files]


def _check_cached(path: Path, digest: str) -> None:
    """Compare a large file of a hub's cache with the SHA-256 that the hub announced: the cache stores it under that name."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) and blob.name != digest:
        raise InvalidDataError(
            f"{path.name} in the hub's cache is damaged",
            f"its SHA-256 is {digest}, and the hub announced {blob.name}",
            f"Remove it, then run the same command again to download it: rm {shlex.join((str(path), str(blob)))}",
        )


@dataclass(frozen=True)
class CheckpointContent:
    """A Hugging Face directory by content: ``fingerprint`` of everything the converter reads; ``weights`` of the tensors and
    the configuration alone, which stay when a model card is edited; ``n_bytes`` of the weights."""

    fingerprint: str
    weights: str
    n_bytes: int


def checkpoint_content(directory: Path, hasher: Hasher) -> CheckpointContent:
    """Hash a checkpoint's weights and everything else in its folder except weights in formats that are not converted."""
    weights = check_safetensors(directory).files
    others = sorted(
        entry
        for entry in directory.iterdir()
        if entry.is_file() and entry not in weights and entry.suffix.lower() not in _OTHER_WEIGHTS
    )
    large = [path for path in others if path.stat().st_size >= _QUICK_BYTES]
    found = dict(zip([*weights, *large], hasher([*weights, *large]), strict=True))
    found |= {path: sha256(path) for path in others if path not in found}
    named = {path.name: digest for path, digest in found.items()}
    model = {path.name: named[path.name] for path in (*weights, directory / "config.json") if path.name in named}
    return CheckpointContent(_joined(named), _joined(model), sum(path.stat().st_size for path in weights))


def _joined(digests: dict[str, str]) -> str:
    text = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    return joint_sha256([hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()])


def stamped_fingerprint(directory: Path) -> str:
    """The fingerprint of earlier versions, for records they wrote: small files by content, weights by name, size and time."""
    digest = hashlib.sha256()
    for path in sorted(entry for entry in directory.iterdir() if entry.is_file()):
        at = stamp(path)
        digest.update(f"{path.name}\0{at.size}\0".encode())
        digest.update(
            path.read_bytes() if at.size < _QUICK_BYTES and path.suffix != ".safetensors" else str(at.mtime_ns).encode()
        )
    return f"sha256:{digest.hexdigest()}"
