"""Public calibration texts in the managed cache: listing them, and fetching one.

In the cache, ``calibration/SET/FILE`` is a text and ``FILE.json`` the record of its origin. The record is written last: a text
without one, or whose SHA-256 differs from it, is fetched again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.calibration.public.catalogue import SETS, CalibrationSet, WantedSet, choose_text, find_set
from imatrix_runner.calibration.public.download_set import download_text
from imatrix_runner.context.context import Context
from imatrix_runner.errors import DownloadError, InvalidDataError, RunnerError, from_os_error
from imatrix_runner.events import Saved, info, warning
from imatrix_runner.files import atomic_writer, discard, human_bytes, publish, read_json, require_space, sha256, write_json
from imatrix_runner.models.hub import is_offline
from imatrix_runner.toolchain.store import Store, cache_dir, now


@dataclass(frozen=True)
class SetRecord:
    """Origin of a text in the cache. ``source``: its URL, or ``repository@commit:path``; ``source_sha256``: of the downloaded
    file, which is the text itself unless it was ``converted``. ``documents``: number of rows converted."""

    name: str
    source: str
    bytes: int
    sha256: str
    date: str
    licence: str
    source_sha256: str
    converted: str = ""
    documents: int | None = None
    format: int = 1


@dataclass(frozen=True)
class FetchedSet:
    """A text in the cache, and its record. ``replaced``: the record of an earlier version with other content."""

    path: Path
    record: SetRecord
    was_cached: bool
    replaced: SetRecord | None = None

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def sha256(self) -> str:
        return self.record.sha256

    @property
    def n_bytes(self) -> int:
        return self.record.bytes

    @property
    def licence(self) -> str:
        return self.record.licence

    @property
    def origin(self) -> str:
        return self.record.source


@dataclass(frozen=True)
class ListedSet:
    """A set of the catalogue, and its texts that are in the cache."""

    set: CalibrationSet
    fetched: tuple[tuple[Path, SetRecord], ...]


def list_sets(cache: Path | None = None) -> tuple[ListedSet, ...]:
    """All sets, each with its texts in the cache, without network access and without reading the texts."""
    root = _root(cache)
    return tuple(ListedSet(each, tuple(_kept(root / each.name))) for each in SETS)


def fetch_set(
    name: str,
    context: Context,
    *,
    offline: bool = False,
    force: bool = False,
    cache: Path | None = None,
    env: Mapping[str, str] = os.environ,
) -> FetchedSet:
    """The public text ``NAME[:TEXT]``: from the cache if it is complete there, else downloaded into it.

    ``force`` downloads it again; ``offline`` never uses the network and wins over ``force``. Raises :class:`UsageError` (no
    such set or text), :class:`DownloadError`, ``NoSpaceError``, and ``InterruptedRunError`` once stopped.
    """
    wanted = find_set(name)
    if not wanted.set.open:
        text = choose_text(wanted, wanted.set.texts)
        wanted = WantedSet(wanted.set, text.name)
    offline = offline or is_offline()
    shelf = _root(cache) / wanted.set.name
    if not force or offline:
        kept = _whole(shelf, wanted, context, warn=True)
        if kept is not None:
            return kept
    if offline:
        raise _not_cached(wanted, shelf)
    with Store(_root(cache).parent).locked("calibration", context.stop, context.sink):
        # Another process may have fetched it while this one waited.
        kept = None if force else _whole(shelf, wanted, context, warn=False)
        return kept or _fetch(wanted, shelf, context, env)


def copy_set(fetched: FetchedSet, out: Path, *, force: bool) -> None:
    """Copy a fetched text to the user's file ``out``; an existing file is replaced only with ``force``."""
    refuse_taken(out, force=force)
    require_space(out, fetched.n_bytes, out.name)
    with atomic_writer(out) as handle, fetched.path.open("rb") as source:
        shutil.copyfileobj(source, handle)


def refuse_taken(out: Path, *, force: bool) -> None:
    """Raise :class:`InvalidDataError` if ``out`` exists and may not be replaced."""
    if out.exists() and not force:
        raise InvalidDataError(
            f"{out} already exists",
            "your files are never overwritten",
            "Choose another name with -o, or overwrite it with --force.",
        )


def _root(cache: Path | None) -> Path:
    return (cache or cache_dir()) / "calibration"


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _kept(shelf: Path) -> list[tuple[Path, SetRecord]]:
    """The texts of a set that are in the cache with the size that their records state."""
    found = []
    for note in sorted(shelf.glob("[!.]*.json")):
        path = note.with_name(note.name.removesuffix(".json"))
        try:
            record = read_json(note, SetRecord)
        except RunnerError:
            continue  # an unreadable record proves nothing
        if path.is_file() and path.stat().st_size == record.bytes:
            found.append((path, record))
    return found


def _places(shelf: Path, wanted: WantedSet) -> list[Path]:
    """Paths at which the wanted text may be in the cache. The listing of an open set is not fetched to find out."""
    files = [text.file for text in wanted.set.texts if wanted.text in (text.name, text.file, text.path)]
    if not files and wanted.text:
        files = [wanted.text, f"{wanted.text.removesuffix('.parquet')}.txt"]
    return [shelf / file for file in files]


def _whole(shelf: Path, wanted: WantedSet, context: Context, *, warn: bool) -> FetchedSet | None:
    """The wanted text from the cache if its SHA-256 matches its record; ``warn`` reports a damaged one."""
    for path in _places(shelf, wanted):
        if not _record_path(path).is_file():
            continue
        try:
            record = read_json(_record_path(path), SetRecord)
            if path.is_file() and sha256(path, lambda _n: context.stop.check()) == record.sha256:
                return FetchedSet(path, record, was_cached=True)
            why = "was changed: its SHA-256 differs from its record" if path.is_file() else "is missing"
        except InvalidDataError as error:
            why = f"cannot be checked: {error}"
        if warn:
            context.sink(warning(f"{path} {why}."))
    return None


def _not_cached(wanted: WantedSet, shelf: Path) -> DownloadError:
    there = [record.name for _, record in _kept(shelf)]
    return DownloadError(
        f"{wanted} is not in the cache",
        "offline mode is on (--offline or HF_HUB_OFFLINE)" + (f"; the cache has {', '.join(there)}" if there else ""),
        f"Fetch it once online: imatrix-runner calibration fetch {wanted}",
    )


def _fetch(wanted: WantedSet, shelf: Path, context: Context, env: Mapping[str, str]) -> FetchedSet:
    """Download a text, rename it, then write its record; after a crash in between, the text is not trusted."""
    try:
        shelf.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, "preparing the cache", shelf) from error
    new = download_text(wanted, shelf, context, env)
    final, named = shelf / new.text.file, wanted.set.named(new.text.name)
    try:
        size, digest, before = new.part.stat().st_size, sha256(new.part), _before(final)
    except BaseException:
        discard(new.part)
        raise
    origin = (new.source_sha256, new.converted, new.documents)
    record = SetRecord(named, new.source, size, digest, now(), new.licence, *origin)
    publish(new.part, final)
    write_json(_record_path(final), record)
    context.sink(Saved(str(final), "calibration text", record.bytes))
    replaced = before if before is not None and before.sha256 != record.sha256 else None
    if replaced is not None:
        was = f"the copy fetched on {replaced.date[:10]} had SHA-256 {replaced.sha256}"
        context.sink(warning(f"Upstream changed {named}: {was}, the new one has {record.sha256}."))
    context.sink(info(f"{named}: {human_bytes(record.bytes)} from {record.source}; licence: {record.licence}."))
    return FetchedSet(final, record, was_cached=False, replaced=replaced)


def _before(final: Path) -> SetRecord | None:
    """The record of the text that ``final`` replaces; None if it is missing or unreadable."""
    try:
        return read_json(_record_path(final), SetRecord) if _record_path(final).is_file() else None
    except InvalidDataError:
        return None
