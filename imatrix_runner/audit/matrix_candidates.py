"""The matrices that a file may have been made with: the one that was given, and those that are here already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imatrix_runner.audit.metadata_comparison import DeclaredMaking
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Sink, detail
from imatrix_runner.files import sha256
from imatrix_runner.imatrix.formats import MatrixFile, read
from imatrix_runner.models.hub.cached_matrices import cached_matrices
from imatrix_runner.models.model import Model
from imatrix_runner.workspace import Workspace

MatrixPlace = Literal["given", "named", "workspace", "cache"]

_ENDINGS = (".imatrix", ".dat", ".gguf")
_MOST = 8


@dataclass(frozen=True)
class FoundMatrix:
    """A matrix that fits the source. ``place``: given with ``--imatrix``, named by the file's metadata and found next to it or
    its source, in the workspace, or in the hub's cache. ``entries``: number of values, by name."""

    file: MatrixFile
    place: MatrixPlace
    sha256: str
    entries: dict[str, int]

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def name(self) -> str:
        return self.path.name


def find_matrices(
    given: Path | None, declared: DeclaredMaking, file: Model, source: Model, workspace: Workspace | None, sink: Sink
) -> tuple[FoundMatrix, ...]:
    """The candidates, each content once, the likeliest first. Raises :class:`InvalidDataError` if the given one is not usable,
    or does not fit the source."""
    found: dict[str, FoundMatrix] = {}
    for place, path in _places(given, declared, file, source, workspace):
        if len(found) == _MOST:
            break
        try:
            matrix = read(path)
            entries = {name: matrix.matrix.values_per_entry(name) for name in matrix.matrix.entries}
        except InvalidDataError as error:
            if place == "given":
                raise
            sink(detail(f"Not a candidate: {error.sentence()}"))
            continue
        if not _fits(entries, source):
            if place == "given":
                raise InvalidDataError(
                    f"{path} does not fit {source.path.name}",
                    "no entry has the name and the columns of a tensor of the source",
                    "Give the imatrix that was made from this model.",
                )
            continue
        content = sha256(path)
        found.setdefault(content, FoundMatrix(matrix, place, content, entries))
    return tuple(found.values())


def _fits(entries: dict[str, int], source: Model) -> bool:
    wanted = {
        tensor.name: tensor.shape[0] * (tensor.shape[2] if len(tensor.shape) > 2 else 1)
        for tensor in source.tensors
        if tensor.shape
    }
    return any(wanted.get(name) == size for name, size in entries.items())


def _places(
    given: Path | None, declared: DeclaredMaking, file: Model, source: Model, workspace: Workspace | None
) -> Iterator[tuple[MatrixPlace, Path]]:
    if given is not None:
        yield "given", given
    folders = [file.path.parent, source.path.parent, *([workspace.root] if workspace is not None else [])]
    # Names of other machines, with either kind of slash.
    name = declared.imatrix.replace("\\", "/").rpartition("/")[2]
    if name and name not in (".", ".."):
        yield from (("named", path) for folder in dict.fromkeys(folders) if (path := folder / name).is_file())
    if workspace is not None and workspace.root.is_dir():
        first = workspace.find_imatrix()
        if first is not None:
            yield "workspace", first
        for path in sorted(workspace.root.iterdir()):
            if path.is_file() and path.name.endswith(_ENDINGS) and "imatrix" in path.name.lower():
                yield "workspace", path
    yield from (("cache", path) for path in cached_matrices(name if name not in (".", "..") else "", source.name))
