"""Writes to a hub: repositories, commits of files, collections. Everything may be repeated: each call looks first."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from imatrix_runner.errors import UploadError, UsageError
from imatrix_runner.events import Sink
from imatrix_runner.models.hub.advice import Asked, no_hub, require_address
from imatrix_runner.models.hub.fetch import hub_endpoint, token_source
from imatrix_runner.models.hub.listing import is_repository
from imatrix_runner.models.hub.remote_repository import (
    RemoteCommit,
    RemoteFile,
    RemoteRepository,
    commits,
    last_changes,
    look,
    read_small,
)
from imatrix_runner.models.hub.sending import SendMeter, send
from imatrix_runner.models.hub.transfer import is_offline
from imatrix_runner.models.hub.upload_advice import may_not_write, no_token, offline
from imatrix_runner.models.hub.xet_progress import library_progress
from imatrix_runner.models.model import HubId
from imatrix_runner.signals import Stop
from imatrix_runner.untrusted import UnreadableError, as_type

T = TypeVar("T")

Gating = Literal["", "auto", "manual"]
"""Whether readers must ask for access, and who lets them in; empty: everybody may read."""

SMALL_BYTES = 16 << 20
"""Above this size, a file is always in large file storage."""

_WRITING_ROLES = ("admin", "write", "contributor")


class _Organisation(msgspec.Struct, frozen=True):
    name: str
    role: Annotated[str, msgspec.Meta(max_length=40)] = msgspec.field(default="", name="roleInOrg")


class _Account(msgspec.Struct, frozen=True):
    """The fields used of a hub's answer about the owner of a token."""

    name: str
    orgs: list[_Organisation] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class NewFile:
    """A file to write: its path in the repository, and its content, in a file or as bytes. ``sha256`` is known already."""

    name: str
    n_bytes: int
    sha256: str
    path: Path | None = None
    content: bytes | None = None


def git_id(content: bytes) -> str:
    """The id that git gives a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Changes:
    """What is known of a repository while its next commit is decided: its state, and who changed a file last."""

    remote: RemoteRepository
    commits: Callable[[], Sequence[RemoteCommit]]
    last_changes: Callable[[Sequence[str]], Mapping[str, str]]
    read: Callable[[str, str], bytes]


Decide = Callable[[Changes], Sequence[NewFile]]
"""Returns what is missing; called again with a newer state if another commit came first."""


@dataclass(frozen=True)
class PublishingHub:
    """A hub to publish to. The library finds the token by itself; no method takes one.

    Every method raises :class:`UploadError` if the hub refuses or cannot be reached, and ``InterruptedRunError`` once stopped.
    """

    stop: Stop
    sink: Sink
    endpoint: str = field(default_factory=hub_endpoint)

    def asked(self, repo: str) -> Asked:
        return Asked(HubId(repo), self.endpoint, token_source() is not None, perhaps_path=False)

    def page(self, repo: str) -> str:
        """The address of a repository's page."""
        return self.asked(repo).page

    def held_secrets(self) -> tuple[str, ...]:
        """The token that the library would use, to find it where it must not stand."""
        from huggingface_hub import get_token

        token = get_token()
        return (token,) if token else ()

    def check_usable(self, repo: str) -> None:
        """Check what needs no network: the name, the token, that the network may be used."""
        require_address()
        if not is_repository(repo) or "--" in repo or ".." in repo or repo.endswith((".git", "-", ".")):
            raise UsageError(f"{repo!r} is not a hub id", "a repository is named ORG/NAME", "For example: --to me/model-GGUF")
        if is_offline():
            raise offline(self.asked(repo))
        if token_source() is None:
            raise no_token(self.asked(repo))
        _quiet()

    def look(self, repo: str) -> RemoteRepository:
        """The repository as it is now. Raises :class:`UploadError` if it was renamed."""
        asked = self.asked(repo)
        found = self._send(asked, partial(look, asked))
        if found.exists and found.repo != repo:
            raise UploadError(
                f"{repo} is now named {found.repo}",
                f"{asked.host} redirects from the old name, and files are only published under the name that was asked for",
                f"Type it as it is: --to {found.repo}",
            )
        return found

    def require_access(self, remote: RemoteRepository) -> None:
        """Check that the token may write to a repository, or create it. Raises :class:`UploadError`."""
        from huggingface_hub import HfApi

        asked, api = self.asked(remote.repo), HfApi(endpoint=self.endpoint, library_name="imatrix-runner")
        if remote.exists:  # the hub limits how often it says who somebody is
            self._send(asked, partial(api.auth_check, remote.repo, write=True))
            return
        answer = self._send(asked, api.whoami)
        try:
            account, token = as_type(_named(answer), _Account), _token_role(answer)
        except UnreadableError as error:
            raise no_hub(asked) from error
        if token == "read":  # noqa: S105 - a role
            raise may_not_write(asked, f"it is a token of {account.name} that may only read")
        owner = remote.repo.partition("/")[0]
        roles = {each.name.lower(): each.role for each in account.orgs}
        if owner.lower() != account.name.lower() and owner.lower() not in roles:
            raise may_not_write(asked, f"it belongs to {account.name}, who is not a member of {owner}")
        if (role := roles.get(owner.lower(), "")) and role not in _WRITING_ROLES:
            raise may_not_write(asked, f"{account.name} has the role {role} in {owner}, which may not create repositories")

    def create(self, repo: str, *, private: bool) -> RemoteRepository:
        """Make the repository if it is missing, and return it."""
        from huggingface_hub import HfApi

        asked, api = self.asked(repo), HfApi(endpoint=self.endpoint, library_name="imatrix-runner")

        def make() -> RemoteRepository:
            if (found := look(asked)).exists:
                return found
            api.create_repo(repo, private=private, exist_ok=True)
            return look(asked)

        return self._send(asked, make)

    def gate(self, repo: str, gating: Gating) -> None:
        """Have readers ask for access."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, library_name="imatrix-runner")
        self._send(self.asked(repo), partial(api.update_repo_settings, repo, gated=gating or False))

    def bring(
        self,
        known: RemoteRepository,
        decide: Decide,
        title: str,
        description: str,
        meter: Callable[[Asked], SendMeter],
    ) -> RemoteRepository:
        """Write what ``decide`` finds missing, in one commit, and return the repository as it is then; no commit if nothing is.

        Each attempt begins with the repository as it is: a commit whose answer was lost is found, not made again. A commit
        names the one it follows, so that the hub refuses it if another came first. ``known``: the state of a moment ago.
        """
        asked, state = self.asked(known.repo), [known]
        meter_of = meter(asked)

        def attempt() -> RemoteRepository:
            remote = state.pop() if state else look(asked)
            files = decide(self._changes(asked, remote))
            return _commit(asked, remote, files, title, description, meter_of) if files else remote

        return self._send(asked, attempt, meter_of)

    def changes(self, remote: RemoteRepository) -> Changes:
        """The same outside a commit: for plans."""
        asked = self.asked(remote.repo)
        return Changes(
            remote,
            lambda: self._send(asked, partial(commits, asked)),
            lambda names: self._send(asked, partial(last_changes, asked, names, remote.commit)),
            lambda name, revision: self._send(asked, partial(read_small, asked, name, revision)),
        )

    def _changes(self, asked: Asked, remote: RemoteRepository) -> Changes:
        return Changes(
            remote,
            partial(commits, asked),
            lambda names: last_changes(asked, names, remote.commit),
            lambda name, revision: read_small(asked, name, revision),
        )

    def collect(self, collection: str, repo: str) -> str:
        """Put the repository into a collection (its slug, or ``OWNER/TITLE`` for one that is made if missing); return the
        slug."""
        from huggingface_hub import HfApi

        asked, api = self.asked(repo), HfApi(endpoint=self.endpoint, library_name="imatrix-runner")
        owner, _, title = collection.partition("/")

        def put() -> str:
            slug = (
                collection if _is_slug(collection) else str(api.create_collection(title, namespace=owner, exists_ok=True).slug)
            )
            api.add_collection_item(slug, repo, "model", exists_ok=True)
            return slug

        return self._send(asked, put)

    def _send(self, asked: Asked, work: Callable[[], T], meter: SendMeter | None = None) -> T:
        return send(work, asked, self.stop, self.sink, meter)


def _quiet() -> None:
    """Keep the library's own lines and bars off the terminal."""
    from huggingface_hub.utils.logging import set_verbosity

    set_verbosity(logging.ERROR)
    warnings.filterwarnings("ignore", module="huggingface_hub")  # they quote the hub, unread


def _named(answer: object) -> object:
    return {key: answer[key] for key in ("name", "orgs") if key in answer} if isinstance(answer, dict) else answer


def _token_role(answer: Any) -> str:
    """The role of an access token: ``read``, ``write``, ``fineGrained``; empty if the hub does not say."""
    place: Any = answer
    for key in ("auth", "accessToken", "role"):
        place = place.get(key) if isinstance(place, dict) else None
    return place if isinstance(place, str) else ""


def _is_slug(collection: str) -> bool:
    """Whether it ends as slugs of collections do: in a dash and 24 hexadecimal digits."""
    tail = collection.rpartition("-")[2]
    return len(tail) == 24 and all(each in "0123456789abcdef" for each in tail)


def _commit(
    asked: Asked, remote: RemoteRepository, files: Sequence[NewFile], title: str, description: str, meter: SendMeter
) -> RemoteRepository:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=asked.endpoint, library_name="imatrix-runner")
    additions = []
    for file in files:
        addition = CommitOperationAdd(file.name, file.content if file.content is not None else str(file.path))
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # known from the journal: the library need not read the file
        additions.append(addition)
    with library_progress(meter):
        api.preupload_lfs_files(asked.hub_id.repo, additions, free_memory=False)
    made = api.create_commit(
        asked.hub_id.repo, additions, commit_message=title, commit_description=description, parent_commit=remote.commit
    )
    large = {addition.path_in_repo for addition in additions if addition._upload_mode == "lfs"}
    return remote.after(str(made.oid), [_written(file, is_large=file.name in large) for file in files])


def _written(file: NewFile, *, is_large: bool) -> RemoteFile:
    if is_large:
        return RemoteFile(file.name, file.n_bytes, file.sha256)
    content = file.content if file.content is not None else file.path.read_bytes() if file.path is not None else b""
    return RemoteFile(file.name, file.n_bytes, git_id=git_id(content))
