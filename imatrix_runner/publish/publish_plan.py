"""Compares files with a repository: what is there, what is missing, and what is in the way. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imatrix_runner.models.hub import NewFile, RemoteCommit, RemoteFile, RemoteRepository

CARD = "README.md"
"""The name that a hub wants a model card to have."""

_PUBLISHED_BY = "Published-by: imatrix-runner"

FileState = Literal["there", "missing", "replace", "in-the-way"]
"""Of a file on the hub: the same; none; another that this program published; another of somebody else."""


@dataclass(frozen=True)
class FileToPublish:
    """A file and its path in the repository. ``content``: of one that is on no disk; without ``path`` and ``content`` it is no
    longer here, and only counts if it is on the hub. ``git_id``: git's id, empty for one too large to be kept in git."""

    name: str
    n_bytes: int
    sha256: str
    git_id: str = ""
    path: Path | None = None
    content: bytes | None = None

    @property
    def is_here(self) -> bool:
        return self.path is not None or self.content is not None

    def new(self) -> NewFile:
        return NewFile(self.name, self.n_bytes, self.sha256, self.path, self.content)


@dataclass(frozen=True)
class PublishUnit:
    """Files that are committed together: those of a level, or what comes with all levels (``level`` empty)."""

    title: str
    files: tuple[FileToPublish, ...]
    level: str = ""

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


def is_same(file: FileToPublish, remote: RemoteFile | None) -> bool:
    """Whether the hub has this content under this name."""
    if remote is None or remote.n_bytes != file.n_bytes:
        return False
    return remote.sha256 == file.sha256 if remote.sha256 else bool(file.git_id) and remote.git_id == file.git_id


def differing(files: Iterable[FileToPublish], remote: RemoteRepository) -> tuple[str, ...]:
    """The names under which the hub has other content."""
    return tuple(file.name for file in files if file.name in remote.files and not is_same(file, remote.files[file.name]))


def missing(files: Iterable[FileToPublish], remote: RemoteRepository) -> tuple[FileToPublish, ...]:
    """The files that the hub does not have, or has with other content."""
    return tuple(file for file in files if not is_same(file, remote.files.get(file.name)))


def states(files: Iterable[FileToPublish], remote: RemoteRepository, replaceable: Collection[str]) -> dict[str, FileState]:
    """The state of each file, by name. ``replaceable``: names of files on the hub that this program published."""
    found: dict[str, FileState] = {}
    for file in files:
        there = remote.files.get(file.name)
        if there is None:
            found[file.name] = "missing"
        elif is_same(file, there):
            found[file.name] = "there"
        else:
            found[file.name] = "replace" if file.name in replaceable else "in-the-way"
    return found


def is_published_here(commit: RemoteCommit) -> bool:
    """Whether a commit says that this program made it. The line survives a rename, not a squashed history."""
    return _PUBLISHED_BY in commit.message.splitlines()


def replaceable(names: Iterable[str], last: Mapping[str, str], commits: Sequence[RemoteCommit]) -> set[str]:
    """The files among ``names`` that this program changed last. ``last``: the commit that changed each."""
    made_here = {commit.commit for commit in commits if is_published_here(commit)}
    return {name for name in names if last.get(name) in made_here}


def description(version: str, level: str) -> str:
    """The description of a commit. It depends on nothing but the program's version and what is published."""
    return "\n".join((f"Made with imatrix-runner {version}.", "", *_trailers(level)))


def _trailers(level: str) -> tuple[str, ...]:
    return (_PUBLISHED_BY, *((f"Level: {level}",) if level else ()))
