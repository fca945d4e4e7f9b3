"""What ``--tasks`` names: tasks and groups of lm-evaluation-harness, YAML files, and the shipped mini set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.errors import UsageError
from imatrix_runner.files import not_utf8
from imatrix_runner.resources import resource
from imatrix_runner.safe_text import printable

MINI = "mini"
"""The shipped set: 200 items."""

_MINI_PARTS = ("arithmetic", "reading", "format")
_MINI_CODE = "code"
"""The part whose answers are programs."""


@dataclass(frozen=True)
class TaskChoice:
    """``label``: the name as it is shown, ``specs``: what the harness is asked to load for it (names, absolute paths)."""

    label: str
    specs: tuple[str, ...]


def parse_tasks(names: Sequence[str], *, allow_code: bool) -> list[TaskChoice]:
    """The choices that ``names`` make, each once. Raises :class:`UsageError` for a file that is missing or no YAML."""
    found: dict[str, TaskChoice] = {}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise not_utf8(name) from error
        if name == MINI:
            parts = (*_MINI_PARTS, _MINI_CODE) if allow_code else _MINI_PARTS
            found[name] = TaskChoice(name, tuple(str(resource(f"mini_tasks/mini_{part}.yaml")) for part in parts))
        elif name.endswith((".yaml", ".yml")):
            path = Path(name).absolute()
            if not path.is_file():
                raise UsageError(
                    f"There is no file {printable(name)}", "it was given to --tasks as the file of a task", "Check the path."
                )
            found[name] = TaskChoice(path.stem, (str(path),))
        elif "/" in name or Path(name).suffix in (".json", ".jsonl", ".csv", ".txt"):
            raise UsageError(
                f"{printable(name)} is not the file of a task",
                "a task is described by a YAML file, which names its data",
                "Write one next to your data: docs/tasks.md has an example of a few lines.",
            )
        else:
            found[name] = TaskChoice(name, (name,))
    return list(found.values())


def leaves_code_out(names: Sequence[str], *, allow_code: bool) -> bool:
    """Whether the mini set was chosen without the part that runs code."""
    return MINI in names and not allow_code
