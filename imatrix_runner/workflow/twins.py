"""Levels made without imatrix, only to be measured: what each level would be without one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec

from imatrix_runner.errors import RunnerError, from_os_error
from imatrix_runner.events import Event, Started
from imatrix_runner.journal import Journal, Record, describe_change
from imatrix_runner.quantize.levels import offered
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.levels import LevelPlanner
from imatrix_runner.workflow.making import LevelMaker
from imatrix_runner.workflow.measured import EVALUATE, LEVEL_INPUT
from imatrix_runner.workflow.measuring import Subject
from imatrix_runner.workflow.plan import LevelStep
from imatrix_runner.workflow.request import LevelsRequest
from imatrix_runner.workflow.source import Frozen
from imatrix_runner.workspace import Workspace

_NONE = "none"


@dataclass(frozen=True)
class Twins:
    """Plans, makes and removes them, in a workspace of their own inside the model's."""

    request: LevelsRequest
    frozen: Frozen
    session: Session

    @cached_property
    def _inside(self) -> Session:
        """The session, working in the twins' workspace."""
        workspace = Workspace(self.session.workspace.twins, self.session.workspace.model)

        def tell(event: Event) -> None:
            if isinstance(event, Started):
                event = msgspec.structs.replace(event, title=f"{event.title}, without imatrix")
            self.session.sink(event)

        return replace(self.session, workspace=workspace, journal=Journal(workspace.journal), sink=tell)

    @cached_property
    def _planner(self) -> LevelPlanner:
        return LevelPlanner(replace(self.request, one_by_one=False, verify="header"), self.frozen, self._inside)

    def plan(self, made: Mapping[str, Record]) -> tuple[tuple[LevelStep, ...], dict[str, str]]:
        """The twins that can exist of finished levels, and for each level that has none the reason."""
        levels = offered(self.session.types)
        reasons: dict[str, str] = {}
        for name, record in made.items():
            if record.inputs.get("imatrix") == _NONE:
                reasons[name] = "was made without an imatrix itself"
            elif name not in levels:
                reasons[name] = "has no twin: the llama.cpp in use does not offer it"
        with_one = [levels[name] for name in made if name not in reasons]
        steps = self._planner.plan(with_one, None, _NONE) if with_one else ()
        for step in steps:
            name = step.level.name
            if step.state == "fails":
                reasons[name] = f"cannot be made without an imatrix: {step.reason}"
            elif why := _unlike(made[name], step):
                reasons[name] = why
        return tuple(step for step in steps if step.level.name not in reasons), reasons

    def subject(self, step: LevelStep) -> Subject:
        name = f"{step.level.name} without imatrix"
        content = " ".join(("twin of", step.inputs["options"], step.inputs["engine"], step.inputs["model file"]))
        return Subject(name, f"{EVALUATE} {name}", step.files[0], {LEVEL_INPUT: content}, "its level is compared with it")

    def make(self, steps: Sequence[LevelStep]) -> dict[str, RunnerError]:
        """Make those that are not there; by level the error of each that could not be made."""
        inside = self._inside
        try:
            inside.workspace.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, "making room for twins", inside.workspace.root) from error
        todo = [step for step in steps if step.state == "todo"]
        if not todo:
            return {}
        maker = LevelMaker(self._planner.request, self.frozen, inside, None, None, inside.sink)
        made = maker.run(todo)
        return {result.step.level.name: result.error for result in made.results if result.error is not None}

    def remove(self, steps: Sequence[LevelStep]) -> None:
        for step in steps:
            for file in step.files:
                file.unlink(missing_ok=True)

    def tidy(self) -> None:
        shutil.rmtree(self._inside.workspace.root, ignore_errors=True)


def _unlike(made: Record, twin: LevelStep) -> str:
    """Why a twin would differ from its level by more than the imatrix; empty where it would not."""
    for name in ("model file", "options", "engine"):
        if twin.inputs[name] != made.inputs.get(name):
            change = describe_change(name, made.inputs.get(name), twin.inputs[name])
            return f"was made otherwise ({change}): make it again, or use run --evaluate --ab"
    return ""
