"""Baselines: each level made once more without imatrix, measured, and removed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import msgspec

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.context.requests import LevelsRequest
from imatrix_runner.engines.levels import offered
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.errors import RunnerError, from_os_error
from imatrix_runner.evaluate.measure import Subject
from imatrix_runner.events import Event, Started
from imatrix_runner.journal import Journal, StepRecord, describe_change
from imatrix_runner.mixes.mix_facts import is_mix_level
from imatrix_runner.mixes.rounding_facts import rounding_of_level
from imatrix_runner.quantize.executor import LevelMaker
from imatrix_runner.quantize.level_facts import LevelInputs, uncut
from imatrix_runner.quantize.plan import LevelStep
from imatrix_runner.quantize.planner import LevelPlanner
from imatrix_runner.steps import LEVEL_INPUT, MODEL_INPUT, WITHOUT_IMATRIX, step_id
from imatrix_runner.workspace import Workspace


@dataclass(frozen=True)
class Baselines:
    """Plans, makes and removes baselines, in a workspace of their own inside the model's."""

    request: LevelsRequest
    frozen: Frozen
    session: Session

    @cached_property
    def _inside(self) -> Session:
        """The session, working in the baselines' workspace."""
        workspace = Workspace(self.session.workspace.baselines, self.session.workspace.model)

        def relay(event: Event) -> None:
            if isinstance(event, Started):
                event = msgspec.structs.replace(event, title=f"{event.title}, without imatrix")
            self.session.sink(event)

        return replace(self.session, workspace=workspace, journal=Journal(workspace.journal), sink=relay)

    @cached_property
    def _planner(self) -> LevelPlanner:
        options = self.request.options.unsplit
        return LevelPlanner(
            replace(self.request, options=options, one_by_one=False, verify="header"), self.frozen, self._inside
        )

    def plan(self, made: Mapping[str, StepRecord]) -> tuple[tuple[LevelStep, ...], dict[str, str]]:
        """Return the steps of the baselines that can be made, and for every other finished level the reason."""
        levels = offered(self.session.types)
        reasons: dict[str, str] = {}
        for name, record in made.items():
            if record.inputs_as(LevelInputs).imatrix == WITHOUT_IMATRIX:
                reasons[name] = "was made without an imatrix itself"
            elif is_mix_level(record):
                reasons[name] = "has no baseline: its types were chosen with the imatrix"
            elif rounding_of_level(record) != STOCK:
                reasons[name] = "has no baseline: its numbers are not rounded as llama-quantize does"
            elif name not in levels:
                reasons[name] = "has no baseline: the llama.cpp in use does not offer it"
        with_one = [levels[name] for name in made if name not in reasons]
        steps = self._planner.plan(with_one, None, WITHOUT_IMATRIX) if with_one else ()
        for step in steps:
            name = step.level.name
            if step.state == "fails":
                reasons[name] = f"cannot be made without an imatrix: {step.reason}"
            elif why := _unlike(made[name], step):
                reasons[name] = why
        return tuple(step for step in steps if step.level.name not in reasons), reasons

    def subject(self, step: LevelStep) -> Subject:
        name = f"{step.level.name} without imatrix"
        content = " ".join(("twin of", step.inputs["options"], step.inputs["engine"], step.inputs[MODEL_INPUT]))
        return Subject(name, step_id("evaluate", name), step.files[0], {LEVEL_INPUT: content}, "its level is compared with it")

    def make(self, steps: Sequence[LevelStep]) -> dict[str, RunnerError]:
        """Make the baselines that do not exist yet; return the errors by level."""
        inside = self._inside
        try:
            inside.workspace.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, "making room for baselines", inside.workspace.root) from error
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


def _unlike(made: StepRecord, baseline: LevelStep) -> str:
    """Why a baseline would differ from its level by more than the imatrix; empty where it would not. Baselines are one file,
    and hold the same tensors however their level is cut."""
    for name in (MODEL_INPUT, "options", "engine"):
        before = made.inputs.get(name)
        if baseline.inputs[name] != (uncut(before) if before is not None and name == "options" else before):
            change = describe_change(name, before, baseline.inputs[name])
            return f"was made otherwise ({change}): make it again, or use run --evaluate --ab"
    return ""
