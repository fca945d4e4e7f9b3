"""``status``: the state of every workspace in a work directory, from its journal and its lock."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imatrix_runner.errors import RunnerError
from imatrix_runner.files import stamp
from imatrix_runner.journal import Journal, StepOutput
from imatrix_runner.mixes.targets import split_names
from imatrix_runner.steps import MODEL_INPUT
from imatrix_runner.workspace import Workspace, read_owner

State = Literal["running", "resumable", "done", "unreadable"]


@dataclass(frozen=True)
class WorkspaceStatus:
    """One workspace. ``command`` continues it if it is resumable; ``owner`` is the process that holds it."""

    path: Path
    model: str
    state: State
    detail: str
    imatrix: str
    levels_done: int
    levels_wanted: int
    n_bytes: int
    command: str = ""
    owner: str = ""


def list_workspaces(work_dir: Path) -> list[WorkspaceStatus]:
    """The status of every folder with a journal, by name."""
    if not work_dir.is_dir():
        return []
    folders = sorted(entry for entry in work_dir.iterdir() if (entry / "journal.json").is_file())
    return [_status(Workspace(folder, folder.name)) for folder in folders]


def _status(workspace: Workspace) -> WorkspaceStatus:
    try:
        journal = Journal(workspace.journal)
    except RunnerError as error:
        return WorkspaceStatus(workspace.root, workspace.model, "unreadable", error.why, "-", 0, 0, 0)
    model = journal.fact("model_file")
    made = journal.of_kind("level").items()
    records = {name: record for name, record in made if model in (None, record.inputs.get(MODEL_INPUT))}
    done = {name for name, record in records.items() if all(_is_there(output, workspace.root) for output in record.outputs)}
    wanted = set(split_names(journal.fact("levels") or ""))
    owner = read_owner(workspace)
    running = owner is not None and owner.alive
    imatrix = workspace.find_imatrix()
    ranges = journal.of_kind("range")
    missing = sorted(wanted - done)
    unmade = bool(missing) or bool(ranges) or journal.fact("finished") == "no"
    measuring = journal.fact("measuring") or ""
    unfinished = unmade or bool(measuring)
    state: State = "running" if running else "resumable" if unfinished else "done"
    detail = (
        f"{len(ranges)} ranges of the imatrix are done" if ranges else (f"missing: {', '.join(missing)}" if missing else "")
    )
    return WorkspaceStatus(
        path=workspace.root,
        model=journal.fact("model") or workspace.model,
        state=state,
        detail=detail,
        imatrix=imatrix.name if imatrix else "-",
        levels_done=len(done),
        levels_wanted=len(wanted),
        n_bytes=sum(output.stamp.size for name in done for output in records[name].outputs),
        command=((journal.fact("command") or "") if unmade else measuring) if state == "resumable" else "",
        owner=f"process {owner.pid} since {owner.started}" if running and owner else "",
    )


def _is_there(output: StepOutput, root: Path) -> bool:
    """Whether a file is unchanged by its stamp, or in a copied workspace seems so; the content is not read."""
    path = root / output.name
    if not path.is_file():
        return False
    now = stamp(path)
    return now == output.stamp or now.same_content(output.stamp)
