"""Publishes a workspace: levels one after the other, each in a commit of its own, then what describes them, then a look at all.

Nothing is remembered about it: what is missing follows from the repository alone, so the same command continues wherever an
earlier one was killed, and does nothing where all is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from imatrix_runner import __version__
from imatrix_runner.errors import InvalidDataError, RunnerError, UploadError
from imatrix_runner.events import Finished, Sink, Started, info
from imatrix_runner.files import human_bytes
from imatrix_runner.models.hub import Changes, Gating, NewFile, PublishingHub, RemoteRepository, SendMeter
from imatrix_runner.models.hub.advice import Asked
from imatrix_runner.publish.publish_plan import (
    CARD,
    FileState,
    FileToPublish,
    PublishUnit,
    description,
    differing,
    is_same,
    missing,
    replaceable,
    states,
)

PublishedStatus = Literal["uploaded", "there", "failed"]


@dataclass(frozen=True)
class Target:
    """Where to publish, and how a repository is made that does not exist."""

    repo: str
    private: bool = False
    gated: Gating = ""


@dataclass(frozen=True)
class FileResult:
    """What became of one file. ``level`` is empty for files that belong to all levels."""

    name: str
    level: str
    n_bytes: int
    sha256: str
    status: PublishedStatus


@dataclass
class RepositoryPublisher:
    """Publishes units to one repository. :meth:`check` first; the repository is made with the first unit."""

    target: Target
    hub: PublishingHub
    sink: Sink = field(repr=False)
    remote: RemoteRepository | None = None
    _outcomes: dict[str, tuple[FileToPublish, FileResult]] = field(default_factory=dict, repr=False)

    @property
    def results(self) -> tuple[FileResult, ...]:
        """What became of every file that was brought, in order; of one that was tried twice, the latter."""
        return tuple(result for _, result in self._outcomes.values())

    def check(self) -> RemoteRepository:
        """Check what can be checked before hours of work: name, token, access, visibility. Nothing is written."""
        self.hub.check_usable(self.target.repo)
        remote = self.hub.look(self.target.repo)
        self.hub.require_access(remote)
        self._require_private(remote)
        self.remote = remote
        return remote

    def _require_private(self, remote: RemoteRepository) -> None:
        if remote.exists and self.target.private and not remote.private:
            raise UploadError(
                f"{self.target.repo} is public",
                "--private was given, and the visibility of a repository that exists is not changed here",
                "Make it private in its settings, leave --private out, or choose another --to.",
            )

    def states(self, units: Sequence[PublishUnit]) -> dict[str, FileState]:
        """The state of every file on the hub, by name."""
        remote = self.known()
        files = [file for unit in units for file in unit.files]
        others = differing(files, remote)
        mine = self._replaceable(self.hub.changes(remote), others) if others else set()
        return states(files, remote, mine)

    def refuse(self, units: Sequence[PublishUnit]) -> None:
        """Raise for files that cannot be published: another's are in the way, or they are neither here nor there."""
        found = self.states(units)
        if taken := [name for name, state in found.items() if state == "in-the-way"]:
            raise self._in_the_way(taken)
        gone = [file for unit in units for file in unit.files if not file.is_here and found[file.name] != "there"]
        if gone:
            raise self._gone(gone[0])

    def refuse_taken(self, names: Sequence[str]) -> None:
        """Raise if one of these names is that of a file of others; for files that are still to be made."""
        there = [name for name in names if name in self.known().files]
        if there and (taken := set(there) - self._replaceable(self.hub.changes(self.known()), there)):
            raise self._in_the_way(sorted(taken))

    def prepare(self) -> RemoteRepository:
        """Make the repository if it is missing, and have it gated if that was asked for, before a file is in it."""
        remote = self.known()
        if not remote.exists:
            remote = self.hub.create(self.target.repo, private=self.target.private)
            self._require_private(remote)  # somebody else may have made it meanwhile
            kind = "private" if remote.private else "public"
            self.sink(info(f"Made the {kind} repository {self.target.repo}."))
        if self.target.gated and remote.gated != self.target.gated:
            self.hub.gate(self.target.repo, self.target.gated)
            remote = replace(remote, gated=self.target.gated)
        self.remote = remote
        return remote

    def bring(self, unit: PublishUnit, latest: Callable[[Changes], PublishUnit] | None = None) -> None:
        """Upload what is missing of a unit. ``latest``: makes it anew from the repository as it is (a card is merged)."""
        remote, began, last = self.prepare(), time.monotonic(), [unit]
        written: set[str] = set()

        def decide(changes: Changes) -> Sequence[NewFile]:
            last[0] = latest(changes) if latest is not None else unit
            files = missing(last[0].files, changes.remote)
            others = differing(files, changes.remote)
            if others and (taken := set(others) - self._replaceable(changes, others)):
                raise self._in_the_way(sorted(taken))
            if lost := next((file for file in files if not file.is_here or _was_removed(file)), None):
                raise self._gone(lost)
            written.update(file.name for file in files)
            return [file.new() for file in files]

        step = f"publish {unit.title}"
        todo = sum(file.n_bytes for file in missing(unit.files, remote))
        if todo:
            self.sink(Started(step, f"{unit.title} to {self.target.repo}", float(todo), "B"))
        try:
            self.remote = self.hub.bring(
                remote, decide, unit.title, description(__version__, unit.level), partial(self._meter, step, todo)
            )
        except RunnerError as error:
            if todo:
                self.sink(Finished(step, "failed", error.what, time.monotonic() - began))
            self._note(last[0], "failed", [file.name for file in missing(last[0].files, remote)])
            raise
        if todo:
            self.sink(Finished(step, "done", human_bytes(todo), time.monotonic() - began))
        self._note(last[0], "uploaded", written)

    def verify(self) -> bool:
        """Whether the hub has every file with its hash, asked for once more. Raises :class:`UploadError` if not."""
        remote = self.hub.look(self.target.repo)
        self.remote = remote
        for file, _ in self._outcomes.values():
            if not is_same(file, remote.files.get(file.name)):
                raise UploadError(
                    f"{self.target.repo} does not hold {file.name} as it was uploaded",
                    f"its checksum there is another than {file.sha256[:12]}…, or the file is gone",
                    "Run the same command again; if that fails as well, look at the repository's history.",
                )
        return True

    def _note(self, unit: PublishUnit, status: PublishedStatus, names: Collection[str]) -> None:
        for file in unit.files:
            what = status if file.name in names else "there"
            self._outcomes[file.name] = (file, FileResult(file.name, unit.level, file.n_bytes, file.sha256, what))

    def known(self) -> RemoteRepository:
        """The repository as it was when it was last looked at, or written to."""
        return self.remote if self.remote is not None else self.check()

    def _replaceable(self, changes: Changes, names: Sequence[str]) -> set[str]:
        """Those that this program wrote last, and the card, into which what people wrote is merged."""
        return {CARD} | replaceable(names, changes.last_changes(names), changes.commits())

    def _meter(self, step: str, total: int, asked: Asked) -> SendMeter:
        return SendMeter(self.sink, self.hub.stop, asked, step, total)

    def _gone(self, file: FileToPublish) -> InvalidDataError:
        return InvalidDataError(
            f"{file.name} cannot be published",
            f"it is neither in the workspace any more, nor with this content in {self.target.repo}",
            "Make it again with imatrix-runner run MODEL, or leave it out with --levels.",
        )

    def _in_the_way(self, names: Sequence[str]) -> InvalidDataError:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return InvalidDataError(
            f"{self.target.repo} holds another {names[0]}{more}",
            "it was not published by imatrix-runner, or was changed since, and files of others are never overwritten",
            "Choose another repository with --to, other names with --name-template, or remove the file on the hub.",
        )


def _was_removed(file: FileToPublish) -> bool:
    return file.path is not None and not file.path.is_file()
