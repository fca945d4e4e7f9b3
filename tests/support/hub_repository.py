"""The repositories of a loopback hub: files, commits, branches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Commit:
    """``files``: what the repository held after it; ``changed``: the names that it wrote."""

    commit: str
    title: str
    message: str
    changed: tuple[str, ...]
    files: Mapping[str, bytes | Path]

    def document(self) -> dict[str, Any]:
        return {
            "id": self.commit,
            "title": self.title,
            "message": self.message,
            "authors": [{"user": "me"}],
            "date": "2026-01-01T00:00:00.000Z",
        }


@dataclass
class Repository:
    """Files by name (bytes, or a path to serve from); ``revisions`` are further names of its one commit."""

    files: dict[str, bytes | Path]
    commit: str
    revisions: set[str] = field(default_factory=lambda: {"main"})
    gated: bool | str = False
    """Whoever comes without a token may list the files but not fetch them; with one only if ``accepted``."""
    accepted: bool = True
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    date: str = "2026-01-01T00:00:00.000Z"
    created: str = "2026-01-01T00:00:00.000Z"
    trending: int = 0
    described: dict[str, Any] = field(default_factory=dict)
    """Fields that listings have of it instead of what follows from its files."""
    announced: dict[str, int] = field(default_factory=dict)
    """Sizes to tell (in the listing and on HEAD) instead of the true ones."""
    branches: dict[str, Repository] = field(default_factory=dict)
    """Revisions with a commit and files of their own."""
    commits: list[Commit] = field(default_factory=list)
    """What was committed since it was made, oldest first."""
    large: set[str] = field(default_factory=set)
    """Files in large file storage; those that end as models do always are."""

    def at(self, revision: str | None) -> Repository | None:
        """What a branch, tag or commit holds; None for one that there is not."""
        for name, branch in self.branches.items():
            if revision in (name, branch.commit):
                return branch
        if revision is None or revision in self.revisions | {self.commit}:
            return self
        past = next((each for each in self.commits if each.commit == revision), None)
        return Repository(dict(past.files), past.commit, large=self.large) if past is not None else None

    def size(self, name: str) -> int:
        return self.announced.get(name, len(self.content(name)))

    def content(self, name: str) -> bytes:
        held = self.files[name]
        return held if isinstance(held, bytes) else held.read_bytes()

    def is_large(self, name: str) -> bool:
        return name in self.large or name.endswith((".gguf", ".safetensors"))

    def oid(self, name: str) -> str:
        """What the hub compares a new file with: the SHA-256 of a large one, git's id of others."""
        data = self.content(name)
        return hashlib.sha256(data).hexdigest() if self.is_large(name) else git_id(data)

    def last_commit(self, name: str) -> Commit:
        """The commit that wrote a file; for one that was there from the start, one that nobody made."""
        beginning = Commit("0" * 40, "initial commit", "", (), {})
        return next((each for each in reversed(self.commits) if name in each.changed), beginning)

    def add_commit(self, title: str, message: str, files: Mapping[str, bytes | Path]) -> Commit:
        """Commit files; the id follows from what came before and from what is new."""
        seed = repr(
            (self.commit, title, message, {name: hashlib.sha256(_bytes(held)).hexdigest() for name, held in files.items()})
        )
        self.files = {**self.files, **files}
        self.commit = hashlib.sha1(seed.encode(), usedforsecurity=False).hexdigest()
        made = Commit(self.commit, title, message, tuple(files), dict(self.files))
        self.commits.append(made)
        return made


def _bytes(held: bytes | Path) -> bytes:
    return held if isinstance(held, bytes) else held.read_bytes()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
