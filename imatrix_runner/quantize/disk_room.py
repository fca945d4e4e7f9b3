"""Disk space for levels: what unfinished files take already, and the error with figures when it runs out."""

from __future__ import annotations

from collections.abc import Sequence

from imatrix_runner.errors import NoSpaceError
from imatrix_runner.files import free_bytes, human_bytes
from imatrix_runner.quantize.plan import LevelStep
from imatrix_runner.workspace import Workspace


def reserved_bytes(workspace: Workspace, levels: Sequence[str] | None = None) -> int:
    """Return the bytes that unfinished files of these levels (default: all) take: they will be reused or freed."""
    folders = workspace.partial.iterdir() if workspace.partial.is_dir() else ()
    wanted = [folder for folder in folders if levels is None or folder.name in levels]
    return sum(file.stat().st_size for folder in wanted for file in folder.glob("*.gguf"))


def passing_bytes(steps: Sequence[LevelStep], n_jobs: int) -> int:
    """Return the bytes of the largest levels that may be on the disk twice while ``n_jobs`` of them are cut into shards."""
    sizes = [step.facts.n_bytes or 0 for step in steps if step.state == "todo" and len(step.files) > 1]
    return sum(sorted(sizes, reverse=True)[:n_jobs])


def explained(error: NoSpaceError, steps: Sequence[LevelStep], workspace: Workspace) -> NoSpaceError:
    """Return the error with figures. With enough free space it is returned as it is, because then a quota was used up."""
    return error if _needed(steps, workspace) <= free_bytes(workspace.root) else disk_full(steps, workspace)


def disk_full(steps: Sequence[LevelStep], workspace: Workspace) -> NoSpaceError:
    """Return the error for a disk that became full while levels were written, with figures."""
    names = steps[0].level.name if len(steps) == 1 else f"{len(steps)} levels"
    return NoSpaceError(
        f"The disk became full while {names} were made" if len(steps) > 1 else f"The disk became full while {names} was made",
        f"{human_bytes(_needed(steps, workspace))} needed, {human_bytes(free_bytes(workspace.root))} free at {workspace.root}",
        "Free some space, or choose another disk with --work-dir, then run the same command again: it continues.",
    )


def _needed(steps: Sequence[LevelStep], workspace: Workspace) -> int:
    reserved = reserved_bytes(workspace, [step.level.name for step in steps])
    return max(0, sum(step.facts.n_bytes or 0 for step in steps) - reserved)
