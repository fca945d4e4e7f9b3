"""Levels: plan them all from llama.cpp's dry runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from imatrix_runner.engines.base import DryRun, Engine, QuantizeOptions
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import sha256
from imatrix_runner.imatrix.expected import ExpectedMatrix, expect, uncollected
from imatrix_runner.imatrix.formats import MatrixFile, write_gguf
from imatrix_runner.imatrix.matrix import Entry, Matrix
from imatrix_runner.journal import Record, is_intact
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.quantize.levels import Level
from imatrix_runner.quantize.resolve import FAIL, Resolved, Resolver
from imatrix_runner.quantize.weights import Weights, expected_weights, usable_weights
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.plan import (
    MOVE_AWAY,
    LevelStep,
    level_inputs,
    needs_dry_run,
    plan_level,
    step_name,
)
from imatrix_runner.workflow.request import LevelsRequest
from imatrix_runner.workflow.source import Frozen
from imatrix_runner.workspace import Workspace

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class _Draft:
    """A level before llama.cpp was asked: what it is made from, what the journal knows of it, and whether that is enough."""

    level: Level
    inputs: dict[str, str]
    record: Record | None
    intact: bool
    unknown: bool


@dataclass(frozen=True)
class LevelPlanner:
    """Plans and makes the levels of one request from one model."""

    request: LevelsRequest
    frozen: Frozen
    session: Session

    def plan(
        self,
        levels: Sequence[Level],
        matrix: MatrixFile | None,
        fingerprint: str,
        expected: ExpectedMatrix | None = None,
    ) -> tuple[LevelStep, ...]:
        """Plan every level. Without ``matrix`` but with a fingerprint other than ``none`` the imatrix is still to be made:
        levels are judged by what is ``expected`` to be in it (default: what collecting from the model gives), and a stand-in
        takes its place, because its presence changes llama.cpp's choice of types."""
        if matrix is None and fingerprint != "none" and expected is None:
            expected = expect(self.frozen.model)
        weights = self.weights(matrix) if expected is None else expected_weights(expected, self.request.options)
        with _real_or_stand_in(matrix, expected) as imatrix:
            drafts = [self._draft(level, fingerprint) for level in levels]
            engines = {id(engine): engine for engine in map(self._engine, levels)}
            resolvers = {key: self._resolver(engine, drafts, weights, imatrix) for key, engine in engines.items()}
            with ThreadPoolExecutor(max_workers=max(1, psutil.cpu_count() or 1)) as pool:

                def plan(draft: _Draft) -> LevelStep:
                    return self._plan(draft, resolvers[id(self._engine(draft.level))], fingerprint)

                return tuple(pool.map(plan, drafts))

    def dry_runs_without_types(
        self, levels: Sequence[Level], matrix: MatrixFile | None, expected: ExpectedMatrix | None
    ) -> dict[Level, DryRun]:
        """llama.cpp's own choice of types for each level, without any ``--tensor-type``; levels it refuses are left out."""
        options = replace(self.request.options, tensor_types=(), tensor_type_file=None)
        found: dict[Level, DryRun] = {}
        with _real_or_stand_in(matrix, expected) as imatrix:
            for engine in {id(engine): engine for engine in map(self._engine, levels)}.values():
                mine = [level for level in levels if self._engine(level) is engine]
                resolver = Resolver(self.frozen.model, engine, options, imatrix, None).asked(mine, self.session.log("plan"))
                answers = {level: resolver.known[level.name] for level in mine}
                found |= {level: answer for level, answer in answers.items() if isinstance(answer, DryRun)}
        return found

    def _engine(self, level: Level) -> Engine:
        return self.session.engine_for(level.name)

    def _resolver(self, engine: Engine, drafts: Sequence[_Draft], weights: Weights | None, imatrix: Path | None) -> Resolver:
        """Knows the answers for all levels that this engine makes."""
        resolver = Resolver(
            self.frozen.model,
            engine,
            self.request.options,
            imatrix,
            weights,
            uncovered=self.request.uncovered,
        )
        mine = [draft for draft in drafts if self._engine(draft.level) is engine]
        unknown = [draft.level for draft in mine if draft.unknown or resolver.uncovered != FAIL]
        return resolver.asked(unknown, self.session.log("plan"))

    def weights(self, matrix: MatrixFile | None) -> Weights | None:
        """The entries of an imatrix that llama.cpp will use; None without an imatrix."""
        if matrix is None:
            return None
        return usable_weights(matrix.matrix, matrix.path, self.request.options, uncollected(self.frozen.model))

    def _draft(self, level: Level, fingerprint: str, options: QuantizeOptions | None = None) -> _Draft:
        """What can be said of a level without asking llama.cpp."""
        journal, name = self.session.journal, step_name(level)
        inputs = level_inputs(
            level,
            options or self.request.options,
            source=self.frozen.fingerprint,
            imatrix=fingerprint,
            engine=self._engine(level).identity(),
            further=_further(self.request),
        )
        record = journal.get(name)
        intact = journal.still_there(name, save=not self.session.dry_run)
        return _Draft(level, inputs, record, intact, needs_dry_run(record, inputs, intact=intact))

    def _plan(self, draft: _Draft, resolver: Resolver, fingerprint: str) -> LevelStep:
        level, resolved = draft.level, None
        if resolver.uncovered != FAIL:  # pins are options like any other: who has none is not made again
            resolved = self._resolve(level, resolver)
            draft = self._draft(level, fingerprint, resolved.options)
        elif draft.unknown:
            resolved = self._resolve(level, resolver)
        inputs, record, intact = draft.inputs, draft.record, draft.intact
        files = final_files(self.session.workspace, level, self.frozen, keep_split=self.request.options.keep_split)
        foreign = _foreign(files, record, self.session.workspace, intact=intact)
        step = plan_level(level, files, inputs, record, intact=intact, resolved=resolved, foreign=bool(foreign))
        hopeless = resolved is not None and resolved.recipe.failures
        return replace(step, reason=foreign, remedy=MOVE_AWAY) if foreign and step.state == "fails" and not hopeless else step

    def _resolve(self, level: Level, resolver: Resolver) -> Resolved:
        self.session.stop.check()
        return resolver.resolve(level, self.session.log(step_name(level)))


def final_files(workspace: Workspace, level: Level, frozen: Frozen, *, keep_split: bool) -> tuple[Path, ...]:
    """The files a level gives: one, or with ``--keep-split`` as many shards as the source has."""
    single = workspace.level_file(level.name)
    count = len(frozen.model.files)
    if not keep_split:
        return (single,)
    return tuple(single.with_name(f"{single.stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1))


def _foreign(files: Sequence[Path], record: Record | None, workspace: Workspace, *, intact: bool) -> str:
    """Why a final name is taken by a file that is not ours to replace; empty if none is."""
    outputs = record.outputs if record is not None else []
    ours = {output.name for output in outputs if intact or is_intact(output, workspace.root)}
    taken = next((file for file in files if file.exists() and file.name not in ours), None)
    if taken is None:
        return ""
    known = record is not None and any(output.name == taken.name for output in record.outputs)
    try:
        read_header(taken)
        how = "was changed since it was made" if known else "is there and was not made by this workspace"
    except InvalidDataError as error:
        how = f"is there but damaged ({error.why})"
    return f"{taken.name} {how}"


@contextmanager
def _real_or_stand_in(matrix: MatrixFile | None, expected: ExpectedMatrix | None) -> Iterator[Path | None]:
    """The imatrix for dry runs. A stand-in has the expected names, because ``--include-weights`` chooses among them."""
    if matrix is not None:
        yield matrix.path
    elif expected is None or not expected.sizes:
        yield None
    else:
        with scratch_folder() as folder:
            path = folder / "imatrix.gguf"
            entry = Entry(np.ones((1, 1)), np.ones(1, np.int64))
            write_gguf(Matrix(dict.fromkeys(sorted(expected.sizes), entry), 512, 1, ("stand-in",)), path)
            yield path


def _further(request: LevelsRequest) -> str:
    """What else decides a level's bytes: the content of the file of types."""
    path = request.options.tensor_type_file
    return f"--tensor-type-file sha256:{sha256(path)}" if path is not None else ""
