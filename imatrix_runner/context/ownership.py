"""Which workspace belongs to a source.

A workspace is named after its model and belongs to one source: the one that was named when it was created, wherever that is
now. A source is recognised by its place (an updated file at the same place continues) or by its content (a moved or copied file
continues). Another source of the same name gets a workspace of its own, whose name ends in digits made from its place: the same
command finds it again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.context.source_hashes import Hasher, checkpoint_content, stamped_fingerprint
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Sink, info, warning
from imatrix_runner.files import joint_sha256
from imatrix_runner.journal import Journal
from imatrix_runner.models.folder_signs import CACHED
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.models.model import HubId, LocalDirectory, LocalFile, Source, model_name
from imatrix_runner.signals import Stop
from imatrix_runner.steps import FOLDER_INPUT, MODEL_INPUT
from imatrix_runner.workspace import Workspace

_DIGITS = (6, 8, 12, 16)

RELEASED = "released"
"""The journal's fact ``original`` once the files that a model was converted from may be gone."""


@dataclass(frozen=True)
class SourcePlace:
    """Where a source is: ``text`` is its permanent name; ``repo`` and ``commit`` if it is from a hub, also in its cache."""

    text: str
    repo: str = ""
    commit: str = ""


def place_of(source: Source) -> SourcePlace:
    """The place of a source: a hub id with its revision, or the absolute path of a directory or of a file's first shard."""
    if isinstance(source, HubId):
        revision = source.revision or "main"
        file = f":{source.file}" if source.file else ""
        return SourcePlace(f"hub:{source.repo}@{revision}{file}", source.repo, source.revision or "")
    path = source.path.expanduser().absolute()
    if isinstance(source, LocalFile):
        path = path.with_name(shard_names(path)[0])
    folder = path if isinstance(source, LocalDirectory) else path.parent
    for snapshot in (folder, *folder.parents):
        cached = CACHED.fullmatch(snapshot.parent.parent.name) if snapshot.parent.name == "snapshots" else None
        if cached is not None:
            return SourcePlace(str(path), f"{cached['org']}/{cached['name']}", snapshot.name)
    return SourcePlace(str(path))


def remember_hub(journal: Journal, repo: str, commit: str) -> None:
    """Record which commit of which repository the model was fetched from."""
    journal.remember(hub=f"{repo}@{commit}")


def hub_of(journal: Journal) -> tuple[str, str]:
    """Return the repository and the commit that the model was fetched from; both empty if it was not."""
    repo, _, commit = (journal.fact("hub") or "").partition("@")
    return repo, commit


def release_original(journal: Journal) -> None:
    """Record that the files which the model was converted from are no longer needed, and may be removed: from now on the
    converted GGUF is the source, as long as it is there."""
    journal.remember(original=RELEASED)


def claim(journal: Journal, place: SourcePlace, content: str, n_bytes: int) -> None:
    """Record the source that the workspace belongs to."""
    journal.remember(source_at=place.text, source_content=content, source_bytes=str(n_bytes))


def find_workspace(
    source: Source, text: str, work_dir: Path, sink: Sink, stop: Stop, *, force: bool | None = None
) -> Workspace:
    """Return the workspace of a source: its own, else one that belongs to no source yet. Nothing is written.

    ``text`` is what the user typed. With ``force`` the workspace that has the model's name is taken even if it belongs to
    another source; None: the command has no such option.
    """
    root = work_dir.expanduser().absolute()
    name, place = model_name(text if isinstance(source, HubId) else source.path), place_of(source)
    plain = Workspace(root / name, name)
    journals = {folder: journal for folder, journal in _journals(plain) if not is_free(journal)}
    there = [Workspace(folder, folder.name) for folder in journals]
    mine = next((each for each in there if _same_place(journals[each.root], source, place)), None)
    mine = mine or next((each for each in there if _same_content(journals[each.root], source, sink, stop)), None)
    if plain.root not in journals:
        return mine or plain
    if mine is None or force:
        owner = _shown(journals[plain.root].fact("source_at") or journals[plain.root].fact("source") or "another source")
        if force and mine == plain:
            return plain
        if force:
            sink(warning(f"{plain.root} belongs to {owner}; it now belongs to {text} (--force)."))
            return plain
        mine = mine or _own(plain, place, journals)
        how = " (--force takes the other)" if force is not None else ""
        sink(info(f"{plain.root} belongs to {owner}; the workspace of {text} is {mine.root}{how}."))
    return mine


def _shown(place: str) -> str:
    return place.removeprefix("hub:").removesuffix("@main")


def is_free(journal: Journal) -> bool:
    """Whether a workspace records no source."""
    if journal.fact("source_at") is not None or journal.fact("source") is not None:
        return False
    return not any({MODEL_INPUT, FOLDER_INPUT} & {*record.inputs} for record in journal.steps().values())


def _journals(plain: Workspace) -> Iterator[tuple[Path, Journal]]:
    """The journals of the workspaces that carry a model's name, by folder: the plain one first."""
    if plain.journal.is_file():
        yield plain.root, Journal(plain.journal)
    suffixed = re.compile(re.escape(plain.model) + r"-[0-9a-f]{6,16}")
    folders = sorted(plain.root.parent.iterdir()) if plain.root.parent.is_dir() else []
    for folder in folders:
        if suffixed.fullmatch(folder.name) and (folder / "journal.json").is_file():
            try:
                yield folder, Journal(folder / "journal.json")
            except InvalidDataError:
                continue  # perhaps another model's, whose own command will report what is wrong


def _own(plain: Workspace, place: SourcePlace, journals: dict[Path, Journal]) -> Workspace:
    """A workspace for a second source of the same name, by digits of its place; more of them where those are taken."""
    digest = hashlib.sha256(place.text.encode("utf-8", "surrogateescape")).hexdigest()
    names = [f"{plain.model}-{digest[:count]}" for count in _DIGITS]
    name = next((name for name in names if plain.root.with_name(name) not in journals), names[-1])
    return Workspace(plain.root.with_name(name), name)


def _same_place(journal: Journal, source: Source, place: SourcePlace) -> bool:
    if isinstance(source, LocalFile) and _same_path(str(journal.path.parent), str(Path(place.text).parent)):
        return True  # a file in the workspace belongs to it: a converted model
    before = journal.fact("source_at")
    if before is None:
        return _same_location(journal, source, place)
    if before == place.text or _same_path(before, place.text):
        return True
    return bool(place.repo) and _same_snapshot(journal, before, place)


def _same_snapshot(journal: Journal, before: str, place: SourcePlace) -> bool:
    """Whether a hub id and a file or folder of the hub's cache are the same commit of one repository."""
    if before.startswith("hub:") and place.text.startswith("hub:") and before.count(":") + place.text.count(":") > 2:
        return False  # another file of one repository
    repo, commit = hub_of(journal)
    if not repo:  # begun from the cache's own folder
        owner = place_of(LocalDirectory(Path(before)))
        repo, commit = owner.repo, owner.commit
    if repo != place.repo or not commit:
        return False
    return place.commit == commit or (place.text == f"hub:{repo}@main" and not before.startswith("hub:"))


def _same_location(journal: Journal, source: Source, place: SourcePlace) -> bool:
    """The same for a journal of an earlier version, which stored the source as it was typed."""
    location = journal.fact("source")
    repo, _ = hub_of(journal)
    if isinstance(source, HubId):
        return location == str(source) if location else repo == source.repo
    if location is None or (repo and location.startswith(repo)):
        return False
    if isinstance(source, LocalDirectory) and not Path(location).is_absolute():
        return Path(location).name == Path(place.text).name  # typed in a folder that is no longer known
    known = place_of(LocalFile(Path(location))) if isinstance(source, LocalFile) else SourcePlace(location)
    return known.text == place.text or _same_path(known.text, place.text)


def _same_path(one: str, other: str) -> bool:
    """Whether two paths lead to the same file or directory, or would if it existed."""
    if one.startswith("hub:") or other.startswith("hub:"):
        return False
    return os.path.realpath(one) == os.path.realpath(other)


def _same_content(journal: Journal, source: Source, sink: Sink, stop: Stop) -> bool:
    """Whether a local source holds what the workspace's source held; nothing is read where the sizes differ."""
    if isinstance(source, HubId):
        return False
    hasher = Hasher(journal, sink, stop, keep=False)
    content, n_bytes = journal.fact("source_content"), journal.fact("source_bytes")
    if isinstance(source, LocalDirectory):
        steps = journal.of_kind("convert").values()
        if content is None:
            return any(record.inputs.get(FOLDER_INPUT) == stamped_fingerprint(source.path) for record in steps)
        size = sum(path.stat().st_size for path in source.path.glob("model*.safetensors"))
        return n_bytes == str(size) and checkpoint_content(source.path, hasher).weights == content
    files = [source.path.with_name(name) for name in shard_names(source.path)]
    if not all(file.is_file() for file in files):
        return False
    size = sum(file.stat().st_size for file in files)
    if content is None:
        made = [record for record in journal.steps().values() if MODEL_INPUT in record.inputs]
        newest = max(made, key=lambda record: record.finished, default=None)
        content = newest.inputs[MODEL_INPUT] if newest is not None else None
        n_bytes = str(size) if any(each.stamp.size == files[0].stat().st_size for each in journal.hashes().values()) else None
    return content is not None and n_bytes == str(size) and joint_sha256(hasher(files)) == content
