"""Surveys a folder that was given as a model: its listing and its small configuration files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imatrix_runner.bounded import quoted
from imatrix_runner.models.origin import card_base, repository_in
from imatrix_runner.models.safetensors_file import read_model_json
from imatrix_runner.models.sniff import LFS_POINTER

BLOB = re.compile(r"(?:blobs/)?sha256[-:][0-9a-f]{64}")
"""Name of a model's file in Ollama's store."""

_CHECKPOINT = re.compile(r"model[^/]*\.safetensors")
_DEPTH = 3
_MOST_FILES = 5000  # bounds the search of a home directory given by mistake
_POINTER_BYTES = 1024


@dataclass(frozen=True)
class Folder:
    """The content of a folder. ``name`` is used in messages and commands; ``files`` are relative paths with ``/``.

    ``config`` and ``adapter`` are config.json and adapter_config.json, empty if missing. ``pointers``: files that are Git LFS
    pointers; ``blobs``: GGUFs of Ollama's store, the largest first; ``dtypes``: tensor name -> dtype of the checkpoint, if its
    headers were read; ``base``: the hub id of the model this one was made from; ``local`` is False for a repository that was
    only listed.
    """

    name: str
    files: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    pointers: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()
    dtypes: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    local: bool = True

    @property
    def top(self) -> tuple[str, ...]:
        """The files directly in the folder."""
        return tuple(name for name in self.files if "/" not in name)

    @property
    def has_weights(self) -> bool:
        """Whether the folder has a file from which the converter reads weights."""
        return any(map(_CHECKPOINT.fullmatch, self.top))

    def within(self, name: str) -> str:
        """The path of one of the files, quoted for a command."""
        return quoted(Path(self.name) / name)

    def original(self, otherwise: str) -> str:
        """The advice to use the model this one was made from; ``otherwise`` if that is unknown."""
        return f"Give that model itself: imatrix-runner run {self.base}" if self.base else otherwise


def survey(path: Path) -> Folder:
    """List a folder, three levels deep, and read its configuration. Raises ``OSError`` if it cannot be listed, and
    :class:`InvalidDataError` for damaged JSON."""
    files: list[str] = []
    os.scandir(path).close()  # raises OSError, which os.walk ignores
    for root, folders, names in os.walk(path):
        inside = Path(root).relative_to(path)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if len(inside.parts) < _DEPTH else []
        files += [(inside / name).as_posix() for name in sorted(names)]
        if len(files) > _MOST_FILES:
            break
    adapter = _small_json(path / "adapter_config.json")
    base = repository_in(adapter.get("base_model_name_or_path")) or card_base(path / "README.md") or ""
    blobs = [name for name in files if BLOB.fullmatch(name) and _head(path / name, 4) == b"GGUF"]
    return Folder(
        str(path),
        tuple(files),
        _small_json(path / "config.json"),
        adapter,
        tuple(name for name in files if "/" not in name and _is_pointer(path / name)),
        tuple(sorted(blobs, key=lambda name: (path / name).stat().st_size, reverse=True)),
        base=base,
    )


def _small_json(path: Path) -> Mapping[str, Any]:
    return read_model_json(path) if path.is_file() and not _is_pointer(path) else {}


def _is_pointer(path: Path) -> bool:
    return _size(path) <= _POINTER_BYTES and _head(path, len(LFS_POINTER)) == LFS_POINTER


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a dangling link
        return _POINTER_BYTES + 1


def _head(path: Path, count: int) -> bytes:
    with path.open("rb") as handle:
        return handle.read(count)
