"""Searches a hub: repositories made from a model, the files of a repository, and single files."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from imatrix_runner.errors import DownloadError
from imatrix_runner.events import Sink
from imatrix_runner.files import human_bytes
from imatrix_runner.models.hub.advice import Asked, no_hub, offline_without
from imatrix_runner.models.hub.choose_files import RepoFile
from imatrix_runner.models.hub.fetch import default_cache, fetch_files, hub_endpoint, quiet_library, token_source
from imatrix_runner.models.hub.listing import (
    LISTING_SECONDS,
    Listing,
    Sibling,
    is_commit,
    is_repository,
    list_cached,
    list_repository,
    plain_files,
    quantised_from,
    remember_revision,
)
from imatrix_runner.models.hub.pages import ask_page
from imatrix_runner.models.hub.transfer import cached_file, is_offline, patiently
from imatrix_runner.models.model import HubId
from imatrix_runner.signals import Stop
from imatrix_runner.untrusted import UnreadableError, from_json

RepoType = Literal["model", "dataset"]

_MOST_PAGES = 20


class _Found(msgspec.Struct, rename="camel"):
    """A repository in a search result, with the names of its files."""

    id: str
    sha: str | None = None
    last_modified: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\d[T0-9:.Z+-]{0,40}$")] | None = None
    tags: list[str] | None = None
    siblings: list[Sibling] | None = None


@dataclass(frozen=True)
class Hub:
    """A hub and its local cache. Offline, only the cache is used.

    Every method raises :class:`DownloadError` if the hub cannot be used, and ``InterruptedRunError`` once stopped.
    """

    stop: Stop
    sink: Sink
    endpoint: str = field(default_factory=hub_endpoint)
    cache: Path = field(default_factory=default_cache)
    offline: bool = field(default_factory=is_offline)

    def __post_init__(self) -> None:
        quiet_library()

    def repository(self, repo: str, repo_type: RepoType = "model", revision: str | None = None) -> Listing:
        """A repository's files, with their sizes, at the newest commit of a revision."""
        asked = self._asked(repo, repo_type, revision)
        if not self.offline:
            return patiently(partial(list_repository, asked), asked, self.stop.check)
        listing = list_cached(asked, self.cache)
        if listing is None:
            raise offline_without(asked)
        return listing

    def look_up(self, repo: str, repo_type: RepoType = "model") -> Listing | str:
        """A repository's files; or, if only this repository cannot be read, the reason as a phrase."""
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

        try:
            return self.repository(repo, repo_type)
        except DownloadError as error:
            cause = error.__cause__
            if self.offline:
                return "not in the cache"
            if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
                return "does not exist"
            if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (403, 404, 410, 451):
                return "does not exist" if cause.response.status_code == 404 else error.why
            if isinstance(cause, (GatedRepoError, HFValidationError)):
                return error.why
            raise

    def made_from(self, repo: str) -> tuple[Listing, ...]:
        """The repositories tagged as quantised from ``repo``, with the names but not the sizes of their files."""
        if self.offline:
            return ()
        asked = self._asked(repo, "model")
        fields = ("siblings", "sha", "lastModified", "tags")
        params = [("filter", f"base_model:quantized:{repo}"), *(("expand", name) for name in fields)]
        url: str | None = f"{self.endpoint}/api/models"
        found: list[Listing] = []
        for _ in range(_MOST_PAGES):
            page, url = patiently(partial(_page, asked, url or "", params), asked, self.stop.check)
            found += [_listing(entry) for entry in page if is_commit(entry.sha) and is_repository(entry.id)]
            if url is None:
                break
            params = []  # the address of the next page includes them
        return tuple(found)

    def cached(self, listing: Listing, file: RepoFile) -> Path | None:
        """The complete copy of a file in the cache; None if there is none."""
        return cached_file(self._of(listing), file, listing.commit, self.cache)

    def fetch(self, listing: Listing, file: RepoFile, *, limit: int) -> Path:
        """The path of a file in the cache, downloaded if necessary; refused if the hub announces more than ``limit`` bytes."""
        asked = self._of(listing)
        if (path := self.cached(listing, file)) is not None:
            return path
        if self.offline:
            raise offline_without(asked)
        size = patiently(partial(_announced_size, asked, file, listing.commit), asked, self.stop.check)
        for announced in (file.size, size):
            if announced is not None and announced > limit:
                raise DownloadError(
                    f"{file.name} of {listing.repo} is too large",
                    f"{asked.host} announces {human_bytes(announced)}, and the limit is {human_bytes(limit)}",
                    "Nothing was downloaded. Choose another file with --from REPO:FILE.",
                )
        if size is None or size < 0:
            raise no_hub(asked)
        if file.size is not None and size != file.size:
            raise DownloadError(
                f"{file.name} of {listing.repo} has contradictory sizes",
                f"{asked.host} lists it with {file.size} bytes and offers {size}",
                "Run the same command again; if that fails as well, check your proxy and HF_ENDPOINT.",
            )
        wanted = RepoFile(file.name, size)
        (path,) = fetch_files(asked, [wanted], listing.commit, self.cache, self.stop, self.sink, impatient=True)
        remember_revision(asked, listing.commit, self.cache)
        return path

    def _asked(self, repo: str, repo_type: RepoType, revision: str | None = None) -> Asked:
        return Asked(HubId(repo, revision), self.endpoint, token_source() is not None, repo_type, perhaps_path=False)

    def _of(self, listing: Listing) -> Asked:
        return self._asked(listing.repo, "dataset" if listing.repo_type == "dataset" else "model")


def concerns_one_file(error: DownloadError) -> bool:
    """Whether an error concerns one file or repository only, not the hub or the network, so that another may work."""
    from huggingface_hub.errors import HfHubHTTPError

    cause = error.__cause__
    if isinstance(cause, HfHubHTTPError):
        answered = cause.response
        return answered.status_code in (403, 404, 410, 451) or answered.headers.get("X-Error-Code") == "GatedRepo"
    return cause is None or (isinstance(cause, OSError) and "Consistency check failed" in str(cause))


def _page(asked: Asked, url: str, params: list[tuple[str, str]]) -> tuple[list[_Found], str | None]:
    """One page of a search, and the address of the next."""
    content, following = ask_page(asked, url, params)
    try:
        return from_json(content, list[_Found]), following
    except UnreadableError as error:
        raise no_hub(asked) from error


def _listing(entry: _Found) -> Listing:
    files = plain_files((sibling.rfilename, sibling.size) for sibling in entry.siblings or ())
    return Listing(entry.id, "model", entry.sha or "", entry.last_modified, files, None, quantised_from(entry.tags or ()))


def _announced_size(asked: Asked, file: RepoFile, commit: str) -> int | None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(asked.hub_id.repo, file.name, repo_type=asked.repo_type, revision=commit, endpoint=asked.endpoint)
    size: int | None = get_hf_file_metadata(url, endpoint=asked.endpoint, timeout=LISTING_SECONDS).size
    return size
