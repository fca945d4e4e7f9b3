"""Published imatrices: find those for a model, fetch the best that fits, and put it into the workspace."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.context.context import Context
from imatrix_runner.context.ownership import find_workspace
from imatrix_runner.errors import DownloadError, InvalidDataError, RunnerError, UsageError, from_os_error
from imatrix_runner.events import Saved, Sink, info, warning
from imatrix_runner.files import discard, human_bytes, part_path, publish, require_space, sha256, write_json
from imatrix_runner.imatrix.formats import Format, MatrixFile, read
from imatrix_runner.imatrix.matrix import misfits, problems
from imatrix_runner.imatrix.published.find_matrix import Findings, PublishedRequest, checked, compute_one, find, listing_of
from imatrix_runner.imatrix.published.publishers import MOST_BYTES, MatrixCandidate, RepoType
from imatrix_runner.models.hub import Hub, RepoFile, concerns_one_file, is_offline
from imatrix_runner.models.model import HubId, LocalFile, Model, Source, open_gguf, parse_source
from imatrix_runner.signals import Stop
from imatrix_runner.workspace import Workspace, hold

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class MatrixSource:
    """Where a placed matrix came from: the content of ``imatrix.source.json`` next to it."""

    repo: str
    repo_type: RepoType
    commit: str
    path: str
    size: int
    sha256: str
    date: str | None
    format: Format
    entries: int
    chunks: int
    dataset: str


@dataclass(frozen=True)
class Placed:
    """A matrix that was put in its place; ``skipped``: better candidates that could not be used, and why."""

    file: MatrixFile
    source: MatrixSource
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Obtained:
    """For ``run``: the placed matrix, or the ``error`` that says why there is none (``reason``: in short)."""

    placed: Placed | None
    error: RunnerError | None = None

    @property
    def file(self) -> MatrixFile | None:
        return self.placed.file if self.placed is not None else None

    @property
    def reason(self) -> str:
        if self.placed is not None:
            return f"published by {self.placed.source.repo}"
        return self.error.what if self.error is not None else ""


def find_published(request: PublishedRequest, context: Context) -> Findings:
    """Find what is published for a model; only listings are fetched. Raises :class:`DownloadError` if there is nothing."""
    source = parse_source(request.model)
    model = open_gguf(source.path, allow_requantize=True) if isinstance(source, LocalFile) else None
    hub = _hub(request, context.stop, context.sink)
    return find(source, model, request, hub)


def fetch_published(request: PublishedRequest, context: Context) -> Placed:
    """Fetch the best candidate that is a matrix and fits, and place it. The workspace is held only while the file is placed."""
    source = parse_source(request.model)
    workspace = find_workspace(source, request.model, request.work_dir, context.sink, context.stop)
    _refuse_taken(workspace, request)
    model = _local_model(source, workspace)
    found = _fetch(source, model, request, _hub(request, context.stop, context.sink))
    if request.out is not None and request.out.absolute().parent != workspace.root:
        return _place(found, workspace, request, context.sink)
    with hold(workspace, request.command):
        return _place(found, workspace, request, context.sink)


def obtain_published(
    workspace: Workspace,
    model: Model,
    source: Source,
    *,
    sink: Sink,
    stop: Stop,
    base_model: str | None = None,
    wanted: str = "",
    offline: bool = False,
    guess: bool = False,
) -> Obtained:
    """For ``run``, which holds the workspace: place the best published matrix there, or say why there is none.

    Unless ``guess``, a base model that may be another one's (see :class:`~imatrix_runner.models.origin.Origin`) is not good
    enough. Raises only errors that are unrelated to publishing: a stop, a full disk, a matrix that is there already.
    """
    named = str(source if isinstance(source, HubId) else source.path)
    request = PublishedRequest(named, workspace.root.parent, base_model, wanted, offline=offline)
    _refuse_taken(workspace, request)
    try:
        found = _fetch(source, model, request, _hub(request, stop, sink), guess=guess)
    except (DownloadError, UsageError) as error:
        return Obtained(None, error)
    return Obtained(_place(found, workspace, request, sink))


@dataclass(frozen=True)
class _Fetched:
    """A candidate whose content was found good, in the hub's cache."""

    candidate: MatrixCandidate
    file: MatrixFile
    skipped: tuple[str, ...]


def _hub(request: PublishedRequest, stop: Stop, sink: Sink) -> Hub:
    return Hub(stop, sink, offline=request.offline or is_offline())


def _fetch(source: Source, model: Model | None, request: PublishedRequest, hub: Hub, *, guess: bool = True) -> _Fetched:
    """The first candidate, in order of rank, that is a matrix and fits the model."""
    candidates = find(source, model, request, hub, guess=guess).candidates
    shapes = {tensor.name: tensor.shape for tensor in model.tensors} if model is not None else None
    skipped: list[str] = []
    for candidate in candidates:
        try:
            path = hub.fetch(listing_of(candidate), RepoFile(candidate.file, candidate.size), limit=MOST_BYTES)
            file = _usable(path, shapes)
        except InvalidDataError as error:
            skipped.append(f"{candidate}: {error.why}")
        except DownloadError as error:
            if len(candidates) == 1 or not concerns_one_file(error):
                raise
            skipped.append(f"{candidate}: {error.what}, {error.why}")
        else:
            return _Fetched(checked(replace(candidate, size=path.stat().st_size), file), file, tuple(skipped))
        hub.sink(warning(f"Not usable: {_printable(skipped[-1])}"))
    many = len(candidates) > 1
    raise DownloadError(
        f"None of the {len(candidates)} published imatrices can be used" if many else f"{candidates[0]} cannot be used",
        "; ".join(_printable(line) for line in skipped) if many else _printable(skipped[0].removeprefix(f"{candidates[0]}: ")),
        compute_one(request),
    )


def _usable(path: Path, shapes: Shapes | None) -> MatrixFile:
    """Read a fetched file. Raises :class:`InvalidDataError` if it is not a matrix, has unusable values, or does not fit."""
    file = read(path)
    bad = problems(file.matrix) or (misfits(file.matrix, shapes) if shapes is not None else [])
    if bad:
        raise InvalidDataError(f"{path.name} cannot be used", "; ".join(bad[:3]), "Choose another one with --from.")
    return file


def _local_model(source: Source, workspace: Workspace) -> Model | None:
    """Return the model's GGUF to compare a matrix with, as named or as converted into the workspace; None if there is
    neither."""
    names = [f"{workspace.model}-{precision}.gguf" for precision in ("BF16", "F16", "F32")]
    paths = [source.path] if isinstance(source, LocalFile) else [workspace.root / name for name in names]
    path = next((path for path in paths if path.is_file()), None)
    return open_gguf(path, allow_requantize=True) if path is not None else None


def _refuse_taken(workspace: Workspace, request: PublishedRequest) -> None:
    """Raise :class:`InvalidDataError` rather than overwrite a matrix without ``--force``."""
    taken = workspace.find_imatrix() if request.out is None else request.out if request.out.exists() else None
    if taken is not None and not request.force:
        raise InvalidDataError(
            f"{taken} is there already",
            "it would be used instead of, or overwritten by, the published one",
            "Use it as it is, or replace it with --force.",
        )


def _place(found: _Fetched, workspace: Workspace, request: PublishedRequest, sink: Sink) -> Placed:
    """Copy the checked file from the cache to where it belongs, with a note of its origin next to it."""
    _refuse_taken(workspace, request)  # again, now that no other process can write there
    out = request.out.absolute() if request.out is not None else workspace.root / f"imatrix.{found.file.format}"
    candidate, matrix = found.candidate, found.file.matrix
    part = part_path(out)
    require_space(out, found.file.path.stat().st_size, out.name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found.file.path, part)
        note = MatrixSource(
            candidate.repo,
            candidate.repo_type,
            candidate.commit,
            candidate.file,
            part.stat().st_size,
            sha256(part),
            candidate.date,
            candidate.format,
            len(matrix.entries),
            matrix.chunk_count,
            ", ".join(matrix.datasets),
        )
        write_json(out.with_suffix(".source.json"), note)
    except OSError as error:
        discard(part)
        raise from_os_error(error, f"writing {out.name}", out) from error
    except RunnerError:
        discard(part)
        raise
    publish(part, out)
    if request.out is None:
        _remove_shadows(workspace, out, sink)
    file = replace(found.file, path=out)
    sink(Saved(str(out), "imatrix", note.size))
    sink(info(f"Imatrix {out}, {human_bytes(note.size)} from {candidate}: {_printable(file.describe())}"))
    return Placed(file, note, found.skipped)


def _remove_shadows(workspace: Workspace, out: Path, sink: Sink) -> None:
    """With ``--force``: remove a replaced matrix that has the other format's name and would be used first."""
    for other in (workspace.root / "imatrix.dat", workspace.imatrix):
        if other != out and other.is_file():
            discard(other)
            sink(info(f"{other.name} was replaced by {out.name}"))


def _printable(text: str) -> str:
    """Return a publisher's text without terminal control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
