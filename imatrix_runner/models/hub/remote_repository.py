"""What a hub says of a repository that is published to: its files with their hashes, its head, its history, its settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import msgspec

from imatrix_runner.models.hub.advice import Asked, no_hub
from imatrix_runner.models.hub.listing import Bytes, announced_sha256, is_commit, is_plain_name
from imatrix_runner.untrusted import UnreadableError, as_type

MOST_FILES = 100_000
_NO_ANSWER = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What the library raises for answers that are not JSON, or hold values of other types than a hub's."""
_GIT_ID = re.compile(r"[0-9a-f]{40}")


class _Info(msgspec.Struct, frozen=True):
    """The fields used of a hub's answer about a repository."""

    id: str
    sha: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{40}$")]
    private: bool = False
    gated: bool | str = False


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. ``sha256``: of the content, of a file in large file storage; ``git_id``: git's id of the content,
    of any other."""

    name: str
    n_bytes: int
    sha256: str = ""
    git_id: str = ""


@dataclass(frozen=True)
class RemoteCommit:
    """A commit: its id, and title and description as its maker wrote them."""

    commit: str
    title: str
    message: str


@dataclass(frozen=True)
class RemoteRepository:
    """A repository at its newest commit. ``exists`` False: there is none of that name yet. ``repo``: its name as the hub has
    it, which differs from the one asked for if it was renamed. ``gated``: ``auto``, ``manual`` or empty."""

    repo: str
    exists: bool
    commit: str = ""
    private: bool = False
    gated: str = ""
    files: Mapping[str, RemoteFile] = field(default_factory=dict)

    def after(self, commit: str, files: Iterable[RemoteFile]) -> RemoteRepository:
        """The same after a commit that wrote ``files``."""
        return replace(self, exists=True, commit=commit, files={**self.files, **{file.name: file for file in files}})


def look(asked: Asked) -> RemoteRepository:
    """Ask once for a repository and all its files, at one commit. Raises the library's errors, but for a missing repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi(endpoint=asked.endpoint, library_name="imatrix-runner")
    try:
        found = api.model_info(asked.hub_id.repo, timeout=60)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return RemoteRepository(asked.hub_id.repo, exists=False)
    info = _checked(asked, {"id": found.id, "sha": found.sha, "private": found.private or False, "gated": found.gated or False})
    files = tree(asked, info.sha)
    gated = info.gated if isinstance(info.gated, str) else "auto" if info.gated else ""
    return RemoteRepository(info.id, True, info.sha, info.private, gated, {file.name: file for file in files})


def _checked(asked: Asked, value: Mapping[str, Any]) -> _Info:
    try:
        return as_type(value, _Info)
    except UnreadableError as error:
        raise no_hub(asked) from error


def tree(asked: Asked, revision: str) -> list[RemoteFile]:
    """All files of a revision with their hashes. Files whose names are no safe relative paths are left out."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=asked.endpoint, library_name="imatrix-runner")
    files: list[RemoteFile] = []
    try:
        for entry in api.list_repo_tree(asked.hub_id.repo, recursive=True, revision=revision):
            if isinstance(entry, RepoFile) and is_plain_name(entry.path):
                files.append(_file(entry))
            if len(files) > MOST_FILES:
                raise no_hub(asked)
    except _NO_ANSWER as error:
        raise no_hub(asked) from error
    return files


def _file(entry: Any) -> RemoteFile:
    size, git_id = as_type(entry.size, Bytes), str(entry.blob_id)
    return RemoteFile(
        str(entry.path), size, announced_sha256(entry.lfs) or "", git_id if _GIT_ID.fullmatch(git_id) and not entry.lfs else ""
    )


def commits(asked: Asked) -> list[RemoteCommit]:
    """The commits of the main branch, newest first."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=asked.endpoint, library_name="imatrix-runner")
    try:
        found = [RemoteCommit(each.commit_id, each.title, each.message) for each in api.list_repo_commits(asked.hub_id.repo)]
        return [each for each in as_type(msgspec.to_builtins(found), list[RemoteCommit]) if is_commit(each.commit)]
    except _NO_ANSWER as error:
        raise no_hub(asked) from error


def last_changes(asked: Asked, names: Iterable[str], revision: str) -> dict[str, str]:
    """The commit that last changed each of these files."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=asked.endpoint, library_name="imatrix-runner")
    try:
        found = api.get_paths_info(asked.hub_id.repo, list(names), expand=True, revision=revision)
        return {str(each.path): str(each.last_commit.oid) for each in found if each.last_commit is not None}
    except _NO_ANSWER as error:
        raise no_hub(asked) from error


def read_small(asked: Asked, name: str, revision: str) -> bytes:
    """The content of a small file; the session bounds its size."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    address = hf_hub_url(asked.hub_id.repo, name, revision=revision, endpoint=asked.endpoint)
    response = get_session().get(address, headers=build_hf_headers(library_name="imatrix-runner"), timeout=60)
    hf_raise_for_status(response)
    content: bytes = response.content
    return content
