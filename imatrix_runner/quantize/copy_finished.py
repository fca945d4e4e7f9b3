"""Levels that are made one by one and hold the same tensors: the first is made, the others are copied from it.

A single pass does not need this, because it computes each pair of tensor and type once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imatrix_runner.context.context import Session
from imatrix_runner.engines.jobs import QuantizeOptions
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.events import Progress, Sink, warning
from imatrix_runner.journal import StepRecord, outputs_intact
from imatrix_runner.quantize.copying import FILE_TYPE, Original, can_be_copied, copy_level
from imatrix_runner.quantize.level_facts import MadeFacts, facts_of_level
from imatrix_runner.quantize.level_files import finished_files
from imatrix_runner.quantize.plan import LevelStep
from imatrix_runner.quantize.plan_notes import same_tensors
from imatrix_runner.quantize.usable_imatrix import UsableImatrix


def alike(steps: Sequence[LevelStep]) -> list[list[LevelStep]]:
    """Group the steps that hold the same tensors, in the order given."""
    first = same_tensors({step.level.name: (step.inputs, step.facts) for step in steps})
    groups: dict[str, list[LevelStep]] = {}
    for step in steps:
        groups.setdefault(first.get(step.level.name, step.level.name), []).append(step)
    return list(groups.values())


@dataclass(frozen=True)
class Copier:
    """Copies levels from the finished ones of a workspace. ``weights``: the entries of the levels' imatrix."""

    session: Session
    options: QuantizeOptions
    weights: UsableImatrix | None
    sink: Sink

    def original(self, step: LevelStep) -> Original | None:
        """Return a finished level that holds the same tensors, made now or in an earlier run; None if there is none."""
        if step.resolved is None or self._file_type(step) is None:
            return None
        for name, record in self.session.journal.of_kind("level").items():
            if name != step.level.name and self._is_alike(record, step):
                files = finished_files(self.session.workspace, record)
                hashes = tuple(output.sha256 for output in record.outputs)
                found = Original(name, files, hashes, record.facts_as(MadeFacts).without_weights)
                if can_be_copied(found, step.resolved.recipe, self.weights):
                    return found
        return None

    def copy(self, original: Original, step: LevelStep, folder: Path) -> bool:
        """Copy into ``folder``; return False if the original is not what was verified."""
        file_type = self._file_type(step)
        assert file_type is not None
        done = 0

        def count(n_bytes: int) -> None:
            nonlocal done
            self.session.stop.check()
            done += n_bytes
            self.sink(Progress(step.step, done, note=f"from {original.name}"))

        if copy_level(original, [folder / file.name for file in step.files], file_type, count):
            return True
        text = f"{original.name} is no longer the file that was verified, so {step.level.name} is not copied from it."
        self.sink(warning(f"{text} To have {original.name} made again, delete it and run the same command."))
        return False

    def _file_type(self, step: LevelStep) -> int | None:
        """Return the number that llama-quantize would write; None if that is not the level's own."""
        if any(override.startswith(f"{FILE_TYPE}=") for override in self.options.override_kv):
            return None
        kinds = self.session.engine_for(step.level.name).types
        return next((kind.number for kind in kinds if kind.name.lower() == step.level.ftype.lower()), None)

    def _is_alike(self, record: StepRecord, step: LevelStep) -> bool:
        try:
            made = {"made": (record.inputs, facts_of_level(record)), "to do": (step.inputs, step.facts)}
        except InvalidDataError:
            return False  # nothing is copied from a level whose record does not say what it is
        return bool(same_tensors(made)) and outputs_intact(record, self.session.workspace.root)
