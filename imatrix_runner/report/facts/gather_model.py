"""Describes the model that levels were made from: from its files, else from an earlier description in the journal, else from a
finished level, which carries the source's metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.chat.prompt_format import prompt_format
from imatrix_runner.context.ownership import hub_of
from imatrix_runner.events import Sink, info, warning
from imatrix_runner.files import encode_json, joint_sha256, stamp
from imatrix_runner.journal import Hashed, Journal
from imatrix_runner.models.gguf_file import GgufHeader
from imatrix_runner.models.gguf_names import shard_names
from imatrix_runner.models.model import Model, open_gguf
from imatrix_runner.models.origin import origin_of_directory, same_name
from imatrix_runner.process import Runner
from imatrix_runner.quantize.plan_notes import quantised_type
from imatrix_runner.report.document import ReportFile, ReportModel
from imatrix_runner.safe_text import printable
from imatrix_runner.untrusted import UnreadableError, from_json
from imatrix_runner.workspace import Workspace

PROJECTOR = "mmproj-"

_HUB_URL = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})/?", re.ASCII
)
_OWN_ADDRESSES = ("general.source.repo_url", "general.source.url", "general.repo_url", "general.url")
_GGUF = re.compile("gguf", re.IGNORECASE)
_ID, _NAME, _LINK = 100, 200, 500
_MOST_BASES, _MOST_LANGUAGES, _MOST_TAGS = 8, 200, 50


@dataclass(frozen=True)
class ReportOrigin:
    """The source as the user named it, without folders: ``location`` is the hub id, or the name of the file or directory."""

    location: str
    repo: str = ""
    commit: str = ""


@dataclass(frozen=True)
class SourceFiles:
    """The files of a source that the journal recorded; ``paths`` is empty unless all are there and unchanged."""

    files: tuple[ReportFile, ...] = ()
    paths: tuple[Path, ...] = ()


def describe_source(
    workspace: Workspace, journal: Journal, fingerprint: str, level: Path | None, runner: Runner, sink: Sink
) -> ReportModel:
    """Describe the source. ``fingerprint``: of its content; ``level``: the first file of a finished level, if there is one.

    ``type`` is empty and sizes are 0 if they are no longer known. Raises :class:`InvalidDataError` for damaged files.
    """
    origin, source = origin_of(journal), find_source(workspace, journal, fingerprint)
    name = printable(journal.fact("model") or workspace.model)
    remembered = _remembered(journal, fingerprint)
    files = (*source.files, *_projectors(workspace))
    dequantised = printable(journal.fact("dequantised") or "")
    if remembered is not None and not source.paths:
        return replace(
            remembered,
            name=name,
            origin=origin.location,
            files=files,
            repo=origin.repo,
            commit=origin.commit,
            dequantised=dequantised,
        )
    n_bytes = sum(file.n_bytes for file in source.files)
    known = ReportModel(
        name,
        "",
        0,
        n_bytes,
        "",
        origin.location,
        files,
        fingerprint,
        repo=origin.repo,
        commit=origin.commit,
        dequantised=dequantised,
    )
    path = source.paths[0] if source.paths else level
    if path is None:
        return known
    model = open_gguf(path, allow_requantize=True, name=name)
    if not source.paths:
        sink(info(f"The source of {name} is gone; the report takes its facts from {path.name}."))
    described = _with_metadata(known, model, _folder(journal), sink)
    return replace(
        described,
        type=model.main_type if source.paths else "",
        quantised=quantised_type(model) if source.paths and not dequantised else "",
        prompt_format=prompt_format(model.header, runner, sink),
    )


def remember_source(journal: Journal, described: ReportModel) -> None:
    """Record a description in the journal, if it came from the source's own files."""
    if described.type:
        journal.remember(described=encode_json(described).decode())


def _remembered(journal: Journal, fingerprint: str) -> ReportModel | None:
    """The description of the same source by an earlier report; None if there is none or it cannot be read."""
    text = journal.fact("described")
    try:
        described = from_json(text, ReportModel) if text else None
    except UnreadableError:
        return None
    return described if described is not None and described.fingerprint == fingerprint else None


def origin_of(journal: Journal) -> ReportOrigin:
    """Where the source came from, as named in the last run."""
    location = printable(journal.fact("source") or "")
    repo, commit = map(printable, hub_of(journal))
    if repo and re.match(re.escape(repo) + "(?:[@:]|$)", location):
        return ReportOrigin(location, repo, commit)
    return ReportOrigin(last_part(location))


def _folder(journal: Journal) -> Path | None:
    """The folder that the source was converted from, if it still exists."""
    location = journal.fact("source")
    folder = Path(location) if location else None
    return folder if folder is not None and (folder / "config.json").is_file() else None


def last_part(path: str) -> str:
    """The last component of a path of any operating system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def find_source(workspace: Workspace, journal: Journal, fingerprint: str) -> SourceFiles:
    """The files whose content has the fingerprint, at their recorded place or in the workspace, which may have moved."""
    hashes, found = journal.hashes(), SourceFiles()
    for first in map(Path, hashes):
        names = shard_names(first)
        known = [hashes.get(str(first.with_name(name))) for name in names]
        whole = [each for each in known if each is not None]
        if first.name != names[0] or len(whole) < len(names) or joint_sha256([each.sha256 for each in whole]) != fingerprint:
            continue
        pairs = tuple(zip(names, whole, strict=True))
        files = tuple(ReportFile(printable(name), each.stamp.size, each.sha256) for name, each in pairs)
        for folder in (first.parent, workspace.root):
            if all(is_same(folder / name, each) for name, each in pairs):
                return SourceFiles(files, tuple(folder / name for name in names))
        found = SourceFiles(files)
    return found


def _projectors(workspace: Workspace) -> tuple[ReportFile, ...]:
    """The projectors that ``--mmproj`` converted: published with the levels, but not counted among the source's bytes."""
    paths = sorted(workspace.root.glob(f"{PROJECTOR}*.gguf"))
    return tuple(ReportFile(printable(path.name), path.stat().st_size) for path in paths)


def is_same(path: Path, hashed: Hashed) -> bool:
    """Whether a file is still the one that was hashed."""
    try:
        return path.is_file() and stamp(path) == hashed.stamp
    except OSError:
        return False  # the disk is gone, or the folder is not readable


# -- metadata, as the publisher wrote it ------------------------------------------------------------------------------------


def _with_metadata(known: ReportModel, model: Model, folder: Path | None, sink: Sink) -> ReportModel:
    header = model.header
    words = _Words(header, sink)
    own = base_models(header, known.repo, folder)
    return replace(
        known,
        architecture=model.architecture,
        n_params=model.n_params,
        n_layers=model.n_layers,
        n_experts=model.n_experts,
        context_length=header.integer(f"{model.architecture}.context_length"),
        base_models=own,
        tuned_from="" if own else _hub_id(header, "general.base_model.0.repo_url"),
        license=words.line("general.license", _ID),
        license_name=words.line("general.license.name", _NAME),
        license_link=words.line("general.license.link", _LINK),
        languages=words.several("general.languages", _ID, _MOST_LANGUAGES),
        tags=words.several("general.tags", _ID, _MOST_TAGS),
    )


@dataclass(frozen=True)
class _Words:
    """Reads texts of a header. Texts that are too long for their key are left out: cut, they would mean something else."""

    header: GgufHeader
    sink: Sink

    def line(self, key: str, limit: int) -> str:
        value = (self.header.text(key) or "").strip()
        if len(value) > limit:
            self.sink(warning(f"{key} of {self.header.path.name} has {len(value)} characters; the report leaves it out."))
            return ""
        return value

    def several(self, key: str, limit: int, most: int) -> tuple[str, ...]:
        value = self.header.metadata.get(key)
        given = [printable(item).strip() for item in value if isinstance(item, str)] if isinstance(value, tuple) else []
        fit = [item for item in given if item and len(item) <= limit][:most]
        if len(fit) < len(given):
            self.sink(warning(f"{key} of {self.header.path.name}: {len(fit)} of {len(given)} are left in the report."))
        return tuple(dict.fromkeys(fit))


def base_models(header: GgufHeader, repo: str, folder: Path | None = None) -> tuple[str, ...]:
    """Hub ids of the model itself and then of the models it was made from.

    Its own id is ``repo``, from which it was fetched, else one that its metadata or the ``folder`` it was converted from give
    with certainty. Empty if its own id is unknown: quantised files of a chat model must not be attributed to its base model.
    """
    own = _own_id(header) or _id_of_folder(folder)
    if repo and not (own and _GGUF.search(repo)):  # the metadata of a GGUF copy names the original
        own = repo
    if not own:
        return ()
    bases = (_hub_id(header, f"general.base_model.{number}.repo_url") for number in range(_MOST_BASES))
    return tuple(dict.fromkeys((own, *filter(None, bases))))


def _own_id(header: GgufHeader) -> str:
    """The hub id under which the weights were first published, from an address in the metadata; empty if uncertain.
    A base model of the same name is the model itself: quantised files and copies name their original so."""
    own = next((repo for key in _OWN_ADDRESSES if (repo := _hub_id(header, key)) and not _GGUF.search(repo)), "")
    if own or header.metadata.get("general.base_model.count", 1) != 1:
        return own
    base = _hub_id(header, "general.base_model.0.repo_url")
    return base if same_name(header.text("general.name"), base.partition("/")[2]) else ""


def _id_of_folder(folder: Path | None) -> str:
    origin = origin_of_directory(folder) if folder is not None else None
    return origin.repo if origin is not None and origin.sure else ""


def _hub_id(header: GgufHeader, key: str) -> str:
    match = _HUB_URL.fullmatch((header.text(key) or "").strip())
    return match[1] if match is not None else ""
