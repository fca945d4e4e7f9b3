"""Data sets of a hub: finds the files of one config and split, fetches them into the cache, and records them for offline
use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from imatrix_runner.errors import DownloadError, InvalidDataError
from imatrix_runner.events import warning
from imatrix_runner.files import human_bytes, read_json, write_json
from imatrix_runner.models.hub.advice import Asked, no_hub, offline_without
from imatrix_runner.models.hub.choose_files import RepoFile
from imatrix_runner.models.hub.dataset_tables import (
    READABLE,
    DatasetId,
    DatasetTable,
    choose_table,
    converted_tables,
    named_tables,
    parse_dataset,
)
from imatrix_runner.models.hub.fetch import fetch_files, token_source
from imatrix_runner.models.hub.listing import Listing, list_repository, repository_folder
from imatrix_runner.models.hub.transfer import cached_file, patiently
from imatrix_runner.models.model import HubId

if TYPE_CHECKING:
    from imatrix_runner.models.hub.search import Hub

__all__ = ["DatasetId", "FetchedDataset", "fetch_dataset", "parse_dataset"]

CONVERTED = "refs/convert/parquet"
"""The branch with the hub's Parquet conversion of a data set."""

_NOTES = ".imatrix-runner"
_LIMIT = 4 << 30


@dataclass(frozen=True)
class FetchedDataset:
    """One split of a config in the hub's cache. ``paths`` in order; ``commit`` and ``branch``: where they come from, which is
    the hub's conversion if there is one. ``licence``: as stated on the data set's card, or None."""

    paths: tuple[Path, ...]
    repo: str
    commit: str
    branch: str
    licence: str | None
    config: str
    split: str

    @property
    def origin(self) -> str:
        """The exact origin of the rows, for a manifest."""
        return f"{self.repo}@{self.commit}:{self.config}:{self.split}"


class _File(msgspec.Struct, frozen=True):
    name: str
    size: int | None


class _Note(msgspec.Struct, frozen=True):
    """A record of one fetch, kept in the repository's folder of the cache. It lists the files, which the cache alone does
    not."""

    wanted: str
    branch: str
    commit: str
    licence: str | None
    config: str
    split: str
    files: list[_File] = field(default_factory=list)


def fetch_dataset(hub: Hub, wanted: DatasetId, *, limit: int = _LIMIT) -> FetchedDataset:
    """Download one table of a data set into the hub's cache, all files from one commit.

    The hub's Parquet conversion is preferred, unless a revision was named. Raises :class:`DownloadError` (missing, gated,
    larger than ``limit`` bytes), :class:`InvalidDataError` (ambiguous, or nothing readable), ``NoSpaceError``, and
    ``InterruptedRunError`` once stopped.
    """
    asked = Asked(HubId(wanted.repo, wanted.revision), hub.endpoint, token_source() is not None, "dataset")
    if hub.offline:
        return _remembered(hub, asked, wanted)
    listing = patiently(partial(list_repository, asked), asked, hub.stop.check)
    asked, table, commit = _find(hub, asked, wanted, listing)
    if any(file.size is None for file in table.files):
        raise no_hub(asked)
    if table.n_bytes > limit:
        raise DownloadError(
            f"{DatasetId(wanted.repo, wanted.revision, table.config, table.split)} is too large",
            f"its {len(table.files)} files have {human_bytes(table.n_bytes)}, and the limit is {human_bytes(limit)}",
            "Choose a smaller config or split, or download one of its files yourself and give its path.",
        )
    if table.partial:
        hub.sink(warning(f"{wanted.repo}: the hub converted only the beginning of {table.config}, split {table.split}."))
    paths = fetch_files(asked, table.files, commit, hub.cache, hub.stop, hub.sink, impatient=True)
    files = [_File(file.name, file.size) for file in table.files]
    branch = asked.hub_id.revision or "main"
    note = _Note(str(wanted), branch, commit, listing.licence, table.config, table.split, files)
    _remember(hub, asked, note)
    return FetchedDataset(paths, wanted.repo, commit, branch, listing.licence, table.config, table.split)


def _find(hub: Hub, asked: Asked, wanted: DatasetId, listing: Listing) -> tuple[Asked, DatasetTable, str]:
    """The request, table and commit to download: from the conversion if it has the table, else from the repository itself."""
    own = named_tables(listing.files)
    conversion = _conversion(hub, asked) if wanted.revision is None else None
    converted = converted_tables(conversion.files) if conversion is not None else ()
    if conversion is not None and converted:
        try:
            table = choose_table(wanted, converted)
        except DownloadError:
            # The conversion may be older, or lack tables that the hub could not convert.
            if not any(wanted.config in (None, table.config) and wanted.split in (None, table.split) for table in own):
                raise
            return asked, choose_table(wanted, own), listing.commit
        return replace(asked, hub_id=HubId(wanted.repo, CONVERTED)), table, conversion.commit
    if wanted.revision is not None and (already := converted_tables(listing.files)):
        own = already  # the conversion's branch or commit was named
    if not own:
        names = [file.name for file in listing.files if not file.name.startswith(".")]
        raise InvalidDataError(
            f"{wanted.repo} has no readable rows",
            f"the hub has no conversion of it, and it has no {', '.join(READABLE)} file"
            + (f" (but {', '.join(names[:4])}{' …' if len(names) > 4 else ''})" if names else ""),
            "Choose another data set, or convert this one yourself and give the file's path.",
        )
    return asked, choose_table(wanted, own), listing.commit


def _conversion(hub: Hub, asked: Asked) -> Listing | None:
    """The listing of the hub's conversion; None if there is none."""
    from huggingface_hub.errors import HfHubHTTPError

    asked = replace(asked, hub_id=HubId(asked.hub_id.repo, CONVERTED))
    try:
        return patiently(partial(list_repository, asked), asked, hub.stop.check)
    except DownloadError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code == 404:
            return None
        raise


def _notes(hub: Hub, asked: Asked) -> Path:
    return repository_folder(asked, hub.cache) / _NOTES


def _remember(hub: Hub, asked: Asked, note: _Note) -> None:
    """Write the record, one file per request, so that two processes do not overwrite each other's."""
    write_json(_notes(hub, asked) / f"{quote(note.wanted, safe='')[-200:]}.json", note)


def _remembered(hub: Hub, asked: Asked, wanted: DatasetId) -> FetchedDataset:
    """The result of an earlier fetch of the same table, if its files are complete. Raises :class:`DownloadError` otherwise."""
    for path in sorted(_notes(hub, asked).glob("*.json")):
        try:
            note = read_json(path, _Note)
        except InvalidDataError:
            continue  # of another program, or damaged
        of_revision = note.branch in (wanted.revision or "main", CONVERTED if wanted.revision is None else None)
        named = (note.config, note.split) == (wanted.config, wanted.split or "train")
        same = note.wanted == str(wanted) or (of_revision and named)
        found = [cached_file(asked, RepoFile(file.name, file.size), note.commit, hub.cache) for file in note.files]
        paths = tuple(path for path in found if path is not None)
        if same and paths and len(paths) == len(note.files):
            return FetchedDataset(paths, wanted.repo, note.commit, note.branch, note.licence, note.config, note.split)
    raise offline_without(replace(asked, hub_id=HubId(str(wanted))))
