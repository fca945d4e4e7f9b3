"""GGUF files in repositories of a hub: which of them a user names, their headers before anything else, and the files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from imatrix_runner.bounded import MoreBytesNeeded
from imatrix_runner.errors import DownloadError, InvalidDataError, RunnerError, UsageError, from_os_error
from imatrix_runner.files import human_bytes
from imatrix_runner.models.gguf_file import GgufHeader, read_header
from imatrix_runner.models.gguf_names import first_shards, is_gguf_model, is_quantised_name, siblings
from imatrix_runner.models.hub.advice import Asked, offline_without
from imatrix_runner.models.hub.choose_files import RepoFile
from imatrix_runner.models.hub.fetch import fetch_files, token_source
from imatrix_runner.models.hub.label_rules import hub_label, is_model_for_llama_cpp
from imatrix_runner.models.hub.listing import Listing
from imatrix_runner.models.hub.search import Hub
from imatrix_runner.models.hub.transfer import cached_file, patiently
from imatrix_runner.models.model import HubId

_NAMED = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,199}))?"
    r"(?::(?P<file>[^:\\]{1,400}))?",
    re.ASCII,
)
_FIRST_BYTES = 4 << 20
_BLOCK_BYTES = 16 << 20
_MOST_HEADER_BYTES = 128 << 20
"""Bound for the part of a file before its tensors. The largest vocabularies take about 12 MB."""


@dataclass(frozen=True)
class NamedGguf:
    """GGUF files as a user names them: a repository, and of it one file, the file of one label (``Q4_K_M``), or all levels
    (empty)."""

    repo: str
    revision: str | None = None
    file: str = ""

    def __str__(self) -> str:
        return self.repo + (f"@{self.revision}" if self.revision else "") + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class PublishedGguf:
    """A GGUF in a repository: its ``files``, the shards in order."""

    listing: Listing
    revision: str | None
    files: tuple[RepoFile, ...]

    @property
    def n_bytes(self) -> int:
        return sum(file.size or 0 for file in self.files)

    @property
    def place(self) -> str:
        """``org/name:file.gguf``."""
        return f"{self.listing.repo}:{self.files[0].name}"

    @property
    def content(self) -> str:
        """A text that changes with the content: hashes where the hub states them, else the commit."""
        return " ".join(file.sha256 or f"{self.listing.commit}:{file.name}" for file in self.files)


def parse_named(text: str) -> NamedGguf | None:
    """Parse ``org/name[@revision][:file.gguf|:LABEL]``; None for anything else."""
    match = _NAMED.fullmatch(text)
    if match is None or ".." in text or (text.lower().endswith(".gguf") and not match["file"]):
        return None
    return NamedGguf(match["repo"], match["revision"], match["file"] or "")


def find_ggufs(hub: Hub, named: NamedGguf) -> dict[str, PublishedGguf | RunnerError]:
    """The files that a name stands for, each by ``org/name:file``, or why it is not taken.

    Of a whole repository these are its quantised models; those whose label another one has are errors. Raises
    :class:`DownloadError`, :class:`InvalidDataError` if the repository has none.
    """
    listing = hub.repository(named.repo, revision=named.revision)
    there = {file.name: file for file in listing.files}
    models = [name for name in first_shards(there) if is_gguf_model(name) and is_model_for_llama_cpp(name)]
    if named.file.lower().endswith(".gguf"):
        chosen = [siblings(named.file)[0]]
        if named.file not in there:
            raise DownloadError(
                f"{named.repo} has no file {named.file}",
                f"it has {', '.join(models[:4]) or 'no GGUF'}{' …' if len(models) > 4 else ''}",
                "Name one that exists.",
            )
    else:
        chosen = [name for name in models if is_quantised_name(name)] if not named.file else _labelled(models, named.file)
        if not chosen:
            raise InvalidDataError(
                f"{named} has nothing to compare",
                f"the repository has {f'no file labelled {named.file}' if named.file else 'no quantised GGUF'}",
                f"Name a file of it: {named.repo}:FILE.gguf",
            )
    labels = Counter(_label(name) for name in chosen)
    found: dict[str, PublishedGguf | RunnerError] = {}
    for name in chosen:
        key, wanted = f"{named.repo}:{name}", siblings(name)
        missing = [shard for shard in wanted if shard not in there]
        if missing:
            found[key] = InvalidDataError(
                f"{key} is incomplete",
                f"{len(missing)} of its {len(wanted)} shards are not in the repository, the first is {missing[0]}",
                "Choose another file, or report it to the repository's owner.",
            )
        elif _label(name) and labels[_label(name)] > 1:
            alike = [other for other in chosen if _label(other) == _label(name)]
            found[key] = UsageError(
                f"{named.repo} has {len(alike)} files of the label {_label(name)}",
                f"they are {', '.join(alike[:4])}",
                f"Name the one that you mean: {key}",
            )
        else:
            found[key] = PublishedGguf(listing, named.revision, tuple(there[shard] for shard in wanted))
    return found


def _label(name: str) -> str:
    label = hub_label(name)
    return label.text if label is not None else ""


def _labelled(names: Sequence[str], wanted: str) -> list[str]:
    return [name for name in names if _label(name) == wanted.upper()]


def read_headers(hub: Hub, published: PublishedGguf, folder: Path) -> tuple[GgufHeader, ...]:
    """The headers of all shards, of which only the beginnings are fetched, into ``folder``.

    Raises :class:`InvalidDataError` for a header that is damaged or announces more than the file has, :class:`DownloadError`.
    """
    return tuple(_read_header(hub, published, file, folder) for file in published.files)


def _read_header(hub: Hub, published: PublishedGguf, file: RepoFile, folder: Path) -> GgufHeader:
    asked = asked_for(hub, published)
    if (path := cached(hub, published, file)) is not None:
        return read_header(path)
    if hub.offline:
        raise offline_without(asked)
    if file.size is None:
        raise DownloadError(
            f"{file.name} of {published.listing.repo} has no size", f"{asked.host} does not state it", "Choose another file."
        )
    path = folder / file.name.rpartition("/")[2]
    needed, have = min(_FIRST_BYTES, file.size), 0
    try:
        with path.open("wb") as out:
            while True:
                while have < needed:
                    count = min(_BLOCK_BYTES, needed - have)
                    ask = partial(_bytes_of, asked, file, published.listing.commit, have, count)
                    data = patiently(ask, asked, hub.stop.check)
                    out.write(data)
                    have += len(data)
                out.flush()
                try:
                    return read_header(path, file.size)
                except MoreBytesNeeded as more:
                    needed = min(file.size, max(2 * have, more.end))
                    if more.end > min(file.size, _MOST_HEADER_BYTES):
                        raise _endless(published, more.end) from more
    except InvalidDataError as error:
        named = f"{published.listing.repo}:{file.name}"
        raise InvalidDataError(error.what.replace(str(path), named), error.why, "Choose another file or revision.") from error
    except OSError as error:
        raise from_os_error(error, f"fetching the header of {file.name}", path) from error


def _endless(published: PublishedGguf, end: int) -> InvalidDataError:
    return InvalidDataError(
        f"{published.place} has too long a header",
        f"{human_bytes(end)} and more come before its tensors; no model has nearly that much",
        "Choose another file or revision.",
    )


def _bytes_of(asked: Asked, file: RepoFile, commit: str, first: int, count: int) -> bytes:
    """``count`` bytes of a file from byte ``first`` on."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import hf_raise_for_status

    address = hf_hub_url(asked.hub_id.repo, file.name, revision=commit, endpoint=asked.endpoint)
    headers = build_hf_headers(library_name="imatrix-runner") | {
        "Range": f"bytes={first}-{first + count - 1}",
        "Accept-Encoding": "identity",
    }
    found = bytearray()
    with get_session().stream("GET", address, headers=headers, timeout=60, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if first and response.status_code != 206:
            raise DownloadError(
                f"{asked.host} cannot send a part of a file",
                f"it answers a request for bytes of {file.name} with all of it (HTTP {response.status_code})",
                "Download the file, and give its path.",
            )
        for block in response.iter_bytes():
            found += block
            if len(found) >= count:
                break
    if len(found) < count:
        raise DownloadError(
            f"{file.name} of {asked.hub_id.repo} arrived with the wrong length",
            f"{asked.host} sent {len(found)} of {count} bytes",
            "Run the same command again.",
        )
    return bytes(found[:count])


def cached(hub: Hub, published: PublishedGguf, file: RepoFile) -> Path | None:
    """A complete copy of a file in the hub's cache; None if there is none."""
    return cached_file(asked_for(hub, published), file, published.listing.commit, hub.cache)


def fetch_gguf(hub: Hub, published: PublishedGguf) -> tuple[Path, ...]:
    """The paths of all shards in the cache of ``hub``, fetched where they are not there. Raises :class:`DownloadError`,
    :class:`NoSpaceError`."""
    asked = asked_for(hub, published)
    paths = tuple(path for file in published.files if (path := cached(hub, published, file)) is not None)
    if len(paths) == len(published.files):
        return paths
    if hub.offline:
        raise offline_without(asked)
    return fetch_files(asked, published.files, published.listing.commit, hub.cache, hub.stop, hub.sink)


def asked_for(hub: Hub, published: PublishedGguf) -> Asked:
    hub_id = HubId(published.listing.repo, published.revision, published.files[0].name)
    return Asked(hub_id, hub.endpoint, token_source() is not None, perhaps_path=False)
