"""The files of a workspace that may be published: only those that the journal knows, and that are still what it verified."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.documents.manifest import manifest_path
from imatrix_runner.errors import InvalidDataError, UsageError, from_os_error
from imatrix_runner.evaluate.measurements import levels_made
from imatrix_runner.files import sha256, stamp
from imatrix_runner.imatrix.collection_facts import CollectedFacts
from imatrix_runner.journal import Journal, StepRecord
from imatrix_runner.mixes.mix_facts import is_mix_level, recipe_of
from imatrix_runner.mixes.mix_recipe import as_tensor_types
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.models.hub import git_id
from imatrix_runner.models.hub.publishing import SMALL_BYTES
from imatrix_runner.publish.publish_plan import FileToPublish
from imatrix_runner.report.document import Report
from imatrix_runner.report.facts.gather_model import PROJECTOR
from imatrix_runner.steps import step_id
from imatrix_runner.workspace import Workspace


@dataclass(frozen=True)
class ReadyLevel:
    """A verified level: its files in order, as ``(name, bytes, hash)``; ``is_here`` False: they were removed since.

    ``file_type``: ``general.file_type`` of its files, None if they are gone.
    """

    name: str
    record: StepRecord
    is_here: bool
    file_type: int | None

    @property
    def files(self) -> tuple[tuple[str, int, str], ...]:
        return tuple((output.name, output.stamp.size, output.sha256) for output in self.record.outputs)

    @property
    def n_bytes(self) -> int:
        return sum(output.stamp.size for output in self.record.outputs)


def ready_levels(workspace: Workspace, journal: Journal, wanted: Sequence[str], *, save: bool = True) -> tuple[ReadyLevel, ...]:
    """The levels to publish, in the order in which they were finished. ``save``: stamps of a copied workspace are renewed.

    A level whose file was removed is among them (it may be on the hub already); one whose file was changed is an
    :class:`InvalidDataError`, a wanted level that was never made a :class:`UsageError`.
    """
    made = levels_made(journal)
    folded = {name.upper(): name for name in made}
    if unknown := [name for name in wanted if name.upper() not in folded]:
        raise UsageError(
            f"{unknown[0]} was not made in {workspace.root}",
            f"finished levels there: {', '.join(made) or 'none'}",
            f"Make it first: imatrix-runner run MODEL --levels {unknown[0]}",
        )
    names = [folded[name.upper()] for name in wanted] or list(made)
    if not names:
        raise InvalidDataError(
            f"There is nothing to publish in {workspace.root}",
            "no level was finished there",
            "Make some first: imatrix-runner run MODEL",
        )
    order = {name: number for number, name in enumerate(made)}
    found = [ready_level(workspace, journal, name, save=save) for name in dict.fromkeys(names)]
    return tuple(sorted(found, key=lambda level: (level.record.finished, order[level.name])))


def ready_level(workspace: Workspace, journal: Journal, name: str, *, save: bool = True) -> ReadyLevel:
    """A finished level, if its files are still what was verified, or gone."""
    step = step_id("level", name)
    paths = [workspace.root / output.name for output in journal[step].outputs]
    there = [path.is_file() for path in paths]
    if any(there) and not journal.still_there(step, save=save):
        raise InvalidDataError(
            f"{name} is not what was verified",
            f"{paths[there.index(True)]} was changed since it was made, or a part of it is missing",
            f"Make it again: move the file away, then imatrix-runner run MODEL --levels {name}",
        )
    record = journal[step]
    if not all(output.sha256 for output in record.outputs):  # in a journal of an earlier version
        raise InvalidDataError(
            f"{name} cannot be published",
            "it was made by an earlier version, which did not record its hash",
            f"Make it again: move the file away, then imatrix-runner run MODEL --levels {name}",
        )
    file_type = read_header(paths[0]).integer("general.file_type") if all(there) else None
    return ReadyLevel(name, record, all(there), file_type)


def level_files(workspace: Workspace, level: ReadyLevel, paths: Sequence[str]) -> tuple[FileToPublish, ...]:
    """The files of a level under the ``paths`` of the repository, one for each shard."""
    return tuple(
        file_on_disk(path, workspace.root / name, digest) if level.is_here else FileToPublish(path, size, digest)
        for (name, size, digest), path in zip(level.files, paths, strict=True)
    )


def recipe_files(workspace: Workspace, level: ReadyLevel) -> Iterator[tuple[Path, bytes]]:
    """The files that lie next to a mix and say how it was made; those that were changed are left out."""
    recipe = recipe_of(workspace, level.name, level.record) if is_mix_level(level.record) else None
    if recipe is None:
        return
    place = workspace.level_file(recipe.level)
    kept = workspace.kept_recipe(recipe.level).read_bytes()
    for path, content in ((place.with_suffix(".recipe.json"), kept), (place.with_suffix(".tensor-types.txt"), None)):
        wanted = content if content is not None else as_tensor_types(recipe)
        if path.is_file() and _read(path) == wanted:
            yield path, wanted


def imatrix_path(workspace: Workspace, journal: Journal, digest: str, name: str) -> Path | None:
    """The file of the imatrix with this content: in the workspace, or where the journal recorded it; None if it is gone."""
    places = [workspace.find_imatrix(), workspace.root / name, *map(Path, journal.hashes())]
    for path in dict.fromkeys(place for place in places if place is not None):
        if path.is_file() and (journal.known_hash(path) or _digest_if_near(workspace, path)) == digest:
            return path
    return None


def _digest_if_near(workspace: Workspace, path: Path) -> str:
    """The hash of a file in the workspace; others are not read, only looked up."""
    return sha256(path) if path.is_relative_to(workspace.root) and path.suffix in (".gguf", ".dat", ".imatrix") else ""


def calibration_manifest(workspace: Workspace, journal: Journal, report: Report) -> Path | None:
    """The manifest of the calibration text that the imatrix was collected from; None if there is none, or if it changed."""
    if report.imatrix is None or not report.imatrix.made_here or report.imatrix.calibration is None:
        return None
    for record in journal.of_kind("imatrix").values():
        facts = record.facts_as(CollectedFacts).calibration
        if facts is None or facts.sha256 != report.imatrix.calibration.sha256 or not facts.manifest:
            continue
        text = Path(facts.path)
        path = manifest_path(text if text.is_absolute() else workspace.root / text)
        if path.is_file():
            return path
    return None


def projectors(workspace: Workspace) -> tuple[Path, ...]:
    """The multimodal projectors that were converted here, recognised by what is in them."""
    paths = sorted(workspace.root.glob(f"{PROJECTOR}{glob.escape(workspace.model)}-*.gguf"))
    return tuple(path for path in paths if path.is_file() and read_header(path).text("general.architecture") == "clip")


def known_digest(journal: Journal, path: Path) -> str:
    """The hash of a file that is not a step's: as the journal remembers it, else read from the file."""
    return journal.known_hash(path) or sha256(path)


def small_file(name: str, content: bytes) -> FileToPublish:
    """A file that is made here and on no disk."""
    return FileToPublish(name, len(content), hashlib.sha256(content).hexdigest(), git_id(content), content=content)


def file_on_disk(name: str, path: Path, digest: str) -> FileToPublish:
    """A file whose hash is known."""
    size = stamp(path).size
    return FileToPublish(name, size, digest, git_id(_read(path)) if size <= SMALL_BYTES else "", path=path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}", path) from error
