"""Finds a workspace by its path or name, or by the model that it belongs to."""

from __future__ import annotations

from pathlib import Path

from imatrix_runner.context.ownership import find_workspace
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Sink
from imatrix_runner.models.model import parse_source
from imatrix_runner.signals import Stop
from imatrix_runner.workspace import Workspace


def workspace_at(name: str, work_dir: Path) -> Workspace | None:
    """The workspace at a path, or of this name in ``work_dir``; None if neither has a journal."""
    for path in (Path(name).expanduser(), work_dir.expanduser() / name):
        if (path / "journal.json").is_file():
            root = path.absolute() if path.name not in ("", "..") else path.resolve()
            return Workspace(root, root.name)
    return None


def named_workspace(name: str, work_dir: Path) -> Workspace:
    """The workspace at a path, or of a model by name. Raises :class:`InvalidDataError` if there is no journal."""
    if (found := workspace_at(name, work_dir)) is None:
        raise _none(name, work_dir)
    return found


def workspace_of(name: str, work_dir: Path, sink: Sink, stop: Stop) -> Workspace:
    """The same, where ``name`` may also be a model as for ``run``: a file, a directory or a hub id."""
    if (found := workspace_at(name, work_dir)) is not None:
        return found
    workspace = find_workspace(parse_source(name), name, work_dir, sink, stop)
    if not workspace.journal.is_file():
        raise InvalidDataError(
            f"Nothing was made of {name} yet",
            f"there is no journal in {workspace.root}",
            f"Make its levels first: imatrix-runner run {name}",
        )
    return workspace


def _none(name: str, work_dir: Path) -> InvalidDataError:
    return InvalidDataError(
        f"{name} is not a workspace",
        f"there is no journal.json in it, nor in {work_dir / name}",
        "List workspaces with: imatrix-runner status; make one with: imatrix-runner run MODEL",
    )
