"""Public calibration texts: what there is, what was fetched, and fetching one into the managed cache.

``calibration/SET/FILE`` in the cache is a text, ``FILE.json`` beside it the record of where it came from. The record is written
last: a text without one, or with another SHA-256 than it says, is fetched again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.calibration.catalogue import SETS, CalibrationSet, Wanted, choose_text, find_set
from imatrix_runner.errors import DownloadError, InvalidDataError, RunnerError, from_os_error
from imatrix_runner.events import Saved, info, warning
from imatrix_runner.files import atomic_writer, discard, human_bytes, publish, read_json, require_space, sha256, write_json
from imatrix_runner.models.hub import is_offline
from imatrix_runner.toolchain.store import Store, cache_dir, now
from imatrix_runner.workflow.calibration_downloads import download_text
from imatrix_runner.workflow.context import Context


@dataclass(frozen=True)
class SetRecord:
    """Where a text in the cache came from. ``source``: its URL, or ``repository@commit:path``; ``source_sha256``: of the file
    that was downloaded, which is the text itself unless it was ``converted``. ``documents``: how many rows made it."""

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
    """A text in the cache, and its record. ``replaced``: the record of another text that upstream had before."""

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
    """A set of the catalogue and those of its texts that lie in the cache."""

    set: CalibrationSet
    fetched: tuple[tuple[Path, SetRecord], ...]


def list_sets(cache: Path | None = None) -> tuple[ListedSet, ...]:
    """Every set there is, and what was fetched of it; nobody is asked and no text is read."""
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
    """A public text by ``NAME[:TEXT]``: from the cache if it is there and whole, else downloaded into it.

    ``force`` asks upstream again, ``offline`` never does. Raises :class:`UsageError` (no such set or text),
    :class:`DownloadError`, ``NoSpaceError``, and ``InterruptedRunError`` once stopped.
    """
    wanted = find_set(name)
    if not wanted.set.open:
        text = choose_text(wanted, wanted.set.texts)
        wanted = Wanted(wanted.set, text.name)
    offline = offline or is_offline()
    shelf = _root(cache) / wanted.set.name
    if not force or offline:
        kept = _whole(shelf, wanted, context, tell=True)
        if kept is not None:
            return kept
    if offline:
        raise _not_cached(wanted, shelf)
    with Store(_root(cache).parent).locked("calibration", context.stop, context.sink):
        # Another process may have fetched it while this one waited.
        kept = None if force else _whole(shelf, wanted, context, tell=False)
        return kept or _fetch(wanted, shelf, context, env)


def copy_set(fetched: FetchedSet, out: Path, *, force: bool) -> None:
    """Copy a fetched text to a file of the user's; one that is there is replaced with ``force`` only."""
    refuse_taken(out, force=force)
    require_space(out, fetched.n_bytes, out.name)
    with atomic_writer(out) as handle, fetched.path.open("rb") as source:
        shutil.copyfileobj(source, handle)


def refuse_taken(out: Path, *, force: bool) -> None:
    """Raise when ``out`` is there and may not be replaced."""
    if out.exists() and not force:
        raise InvalidDataError(
            f"{out} is there already",
            "files of yours are never overwritten",
            "Choose another name with -o, or overwrite it with --force.",
        )


def _root(cache: Path | None) -> Path:
    return (cache or cache_dir()) / "calibration"


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _kept(shelf: Path) -> list[tuple[Path, SetRecord]]:
    """The texts of a set that are there at the length their records tell."""
    found = []
    for note in sorted(shelf.glob("[!.]*.json")):
        path = note.with_name(note.name.removesuffix(".json"))
        try:
            record = read_json(note, SetRecord)
        except RunnerError:
            continue  # it vouches for nothing
        if path.is_file() and path.stat().st_size == record.bytes:
            found.append((path, record))
    return found


def _places(shelf: Path, wanted: Wanted) -> list[Path]:
    """Where the wanted text may lie: of an open set the listing tells, which is not asked while a copy may do."""
    files = [text.file for text in wanted.set.texts if wanted.text in (text.name, text.file, text.path)]
    if not files and wanted.text:
        files = [wanted.text, f"{wanted.text.removesuffix('.parquet')}.txt"]
    return [shelf / file for file in files]


def _whole(shelf: Path, wanted: Wanted, context: Context, *, tell: bool) -> FetchedSet | None:
    """The wanted text, if it is what its record says. A damaged one is told of."""
    for path in _places(shelf, wanted):
        if not _record_path(path).is_file():
            continue
        try:
            record = read_json(_record_path(path), SetRecord)
            if path.is_file() and sha256(path, lambda _n: context.stop.check()) == record.sha256:
                return FetchedSet(path, record, was_cached=True)
            why = "is not what was fetched: its SHA-256 is another than its record says" if path.is_file() else "is gone"
        except InvalidDataError as error:
            why = f"cannot be trusted: {error}"
        if tell:
            context.sink(warning(f"{path} {why}."))
    return None


def _not_cached(wanted: Wanted, shelf: Path) -> DownloadError:
    there = [record.name for _, record in _kept(shelf)]
    return DownloadError(
        f"{wanted} is not in the cache",
        "offline mode is on (--offline or HF_HUB_OFFLINE)" + (f"; of this set there is {', '.join(there)}" if there else ""),
        f"Fetch it once without: imatrix-runner calibration fetch {wanted}",
    )


def _fetch(wanted: Wanted, shelf: Path, context: Context, env: Mapping[str, str]) -> FetchedSet:
    """Download, give the text its name, then write its record: whoever dies in between leaves nothing that is believed."""
    try:
        shelf.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise from_os_error(error, "preparing the cache", shelf) from error
    came = download_text(wanted, shelf, context, env)
    final, named = shelf / came.text.file, wanted.set.named(came.text.name)
    try:
        size, digest, before = came.part.stat().st_size, sha256(came.part), _before(final)
    except BaseException:
        discard(came.part)
        raise
    told = (came.source_sha256, came.converted, came.documents)
    record = SetRecord(named, came.source, size, digest, now(), came.licence, *told)
    publish(came.part, final)
    write_json(_record_path(final), record)
    context.sink(Saved(str(final), "calibration text", record.bytes))
    replaced = before if before is not None and before.sha256 != record.sha256 else None
    if replaced is not None:
        was = f"what was fetched on {replaced.date[:10]} had SHA-256 {replaced.sha256}"
        context.sink(warning(f"Upstream changed {named}: {was}, this has {record.sha256}."))
    context.sink(info(f"{named}: {human_bytes(record.bytes)} from {record.source}; licence: {record.licence}."))
    return FetchedSet(final, record, was_cached=False, replaced=replaced)


def _before(final: Path) -> SetRecord | None:
    """The record of what lay there before, if it can be read."""
    try:
        return read_json(_record_path(final), SetRecord) if _record_path(final).is_file() else None
    except InvalidDataError:
        return None
