"""Plans all levels of a request from llama.cpp's dry runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.context.requests import LevelsRequest
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.jobs import DryRun, QuantizeOptions
from imatrix_runner.engines.levels import Level
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import sha256
from imatrix_runner.imatrix.expected import ExpectedMatrix, expect, uncollected
from imatrix_runner.imatrix.formats import MatrixFile, write_gguf
from imatrix_runner.imatrix.matrix import Matrix, MatrixEntry
from imatrix_runner.journal import StepRecord, differences, is_intact
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.quantize.level_files import finished_files, planned_files, stays_whole
from imatrix_runner.quantize.plan import MOVE_AWAY, LevelStep, level_inputs, needs_dry_run, plan_level
from imatrix_runner.quantize.recipe import Recipe
from imatrix_runner.quantize.resolve import FAIL, Resolved, Resolver
from imatrix_runner.quantize.usable_imatrix import UsableImatrix, expected_weights, usable_weights
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.steps import step_id
from imatrix_runner.workspace import Workspace

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class _Draft:
    """A level before its dry run: its inputs, its journal record, and whether it must be planned at all."""

    level: Level
    inputs: dict[str, str]
    record: StepRecord | None
    intact: bool
    unknown: bool


@dataclass(frozen=True)
class LevelPlanner:
    """Plans the levels of one request from one model; :class:`~imatrix_runner.quantize.executor.LevelMaker` makes them."""

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
        levels are planned with the entries that are ``expected`` in it (default: those that collecting from the model gives),
        and a stand-in takes its place, because its presence changes llama.cpp's choice of types."""
        if matrix is None and fingerprint != "none" and expected is None:
            expected = expect(self.frozen.model)
        weights = self.weights_or_expected(matrix, fingerprint, expected)
        with _real_or_stand_in(matrix, expected) as imatrix:
            drafts = [self._draft(level, fingerprint) for level in levels]
            engines = {id(engine): engine for engine in map(self._engine, levels)}
            resolvers = {key: self._resolver(engine, drafts, weights, imatrix) for key, engine in engines.items()}
            with ThreadPoolExecutor(max_workers=max(1, psutil.cpu_count() or 1)) as pool:

                def plan(draft: _Draft) -> LevelStep:
                    return self._plan(draft, resolvers[id(self._engine(draft.level))], fingerprint)

                return tuple(pool.map(plan, drafts))

    def recipes(
        self, levels: Sequence[Level], matrix: MatrixFile | None, fingerprint: str, expected: ExpectedMatrix | None = None
    ) -> dict[str, Recipe]:
        """Return the recipe of each level by its name, whether it is made or not; arguments as for :meth:`plan`."""
        if matrix is None and fingerprint != "none" and expected is None:
            expected = expect(self.frozen.model)
        weights = self.weights_or_expected(matrix, fingerprint, expected)
        with _real_or_stand_in(matrix, expected) as imatrix:
            resolver = Resolver(
                self.frozen.model,
                self.session.engine,
                self.request.options.unsplit,
                imatrix,
                weights,
                uncovered=self.request.uncovered,
            )
            resolver = resolver.asked(levels, self.session.log("plan"))
            return {level.name: resolver.resolve(level, self.session.log("plan")).recipe for level in levels}

    def weights_or_expected(
        self, matrix: MatrixFile | None, fingerprint: str, expected: ExpectedMatrix | None
    ) -> UsableImatrix | None:
        """Return the entries of the imatrix, or those expected of one that is still to be made; None without one."""
        if matrix is None and fingerprint != "none":
            return expected_weights(expected or expect(self.frozen.model), self.request.options)
        return self.weights(matrix)

    def dry_runs_without_types(
        self, levels: Sequence[Level], matrix: MatrixFile | None, expected: ExpectedMatrix | None
    ) -> dict[Level, DryRun]:
        """Return llama.cpp's own choice of types for each level, without any ``--tensor-type``; levels it refuses are left
        out."""
        options = replace(self.request.options, tensor_types=(), tensor_type_file=None)
        found: dict[Level, DryRun] = {}
        with _real_or_stand_in(matrix, expected) as imatrix:
            for engine in {id(engine): engine for engine in map(self._engine, levels)}.values():
                mine = [level for level in levels if self._engine(level) is engine]
                resolver = Resolver(self.frozen.model, engine, options, imatrix, None).asked(mine, self.session.log("plan"))
                answers = {level: resolver.known[level.name, level.apply(options)] for level in mine}
                found |= {level: answer for level, answer in answers.items() if isinstance(answer, DryRun)}
        return found

    def _engine(self, level: Level) -> Engine:
        return self.session.engine_for(level.name)

    def _resolver(
        self, engine: Engine, drafts: Sequence[_Draft], weights: UsableImatrix | None, imatrix: Path | None
    ) -> Resolver:
        """Return the resolver for all levels that this engine makes, with their dry runs done."""
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

    def weights(self, matrix: MatrixFile | None) -> UsableImatrix | None:
        """Return the entries of an imatrix that llama.cpp will use; None without an imatrix."""
        if matrix is None:
            return None
        return usable_weights(matrix.matrix, matrix.path, self.request.options, uncollected(self.frozen.model))

    def _draft(self, level: Level, fingerprint: str, options: QuantizeOptions | None = None) -> _Draft:
        """Return what is known about a level without a dry run. ``options``: those that it is made with, where they are known:
        a level that fits into one shard has none that say how to cut it."""
        journal, name = self.session.journal, step_id("level", level.name)
        record = journal.get(name)
        intact = journal.still_there(name, save=not self.session.dry_run)
        if options is None:
            options = self.request.options
            if record is not None and intact and stays_whole(finished_files(self.session.workspace, record), options):
                options = options.unsplit
        inputs = level_inputs(
            level,
            options,
            source=self.frozen.fingerprint,
            imatrix=fingerprint,
            engine=self._engine(level).identity(),
            further=_further(self.request),
        )
        return _Draft(level, inputs, record, intact, needs_dry_run(record, inputs, intact=intact))

    def _plan(self, draft: _Draft, resolver: Resolver, fingerprint: str) -> LevelStep:
        level, resolved = draft.level, None
        if resolver.uncovered != FAIL:  # pins count as options; a level without pins keeps its inputs
            resolved = self._resolve(level, resolver)
            draft = self._draft(level, fingerprint, _effective(resolved.options, resolved.recipe))
        elif draft.unknown:
            resolved = self._resolve(level, resolver)
            if self.request.options.is_split:
                draft = self._draft(level, fingerprint, _effective(self.request.options, resolved.recipe))
        inputs, record, intact = draft.inputs, draft.record, draft.intact
        files = self._files(draft, resolved)
        foreign = _foreign(files, record, self.session.workspace, intact=intact)
        step = plan_level(level, files, inputs, record, intact=intact, resolved=resolved, foreign=bool(foreign))
        hopeless = resolved is not None and resolved.recipe.failures
        return replace(step, reason=foreign, remedy=MOVE_AWAY) if foreign and step.state == "fails" and not hopeless else step

    def _files(self, draft: _Draft, resolved: Resolved | None) -> tuple[Path, ...]:
        """Return the final names of a level; those of one that is up to date are in its record."""
        workspace, record = self.session.workspace, draft.record
        if record is not None and draft.intact and not differences(record, draft.inputs):
            return finished_files(workspace, record)
        n_shards = len(resolved.recipe.shards) if resolved is not None else 0
        single = workspace.level_file(draft.level.name)
        return planned_files(single, self.request.options, n_shards, len(self.frozen.model.files))

    def _resolve(self, level: Level, resolver: Resolver) -> Resolved:
        self.session.stop.check()
        return resolver.resolve(level, self.session.log(step_id("level", level.name)))


def _effective(options: QuantizeOptions, recipe: Recipe) -> QuantizeOptions:
    """Return the options that a level depends on: not how to cut it, if it fits into one shard."""
    return options if recipe.shards or recipe.failures else options.unsplit


def _foreign(files: Sequence[Path], record: StepRecord | None, workspace: Workspace, *, intact: bool) -> str:
    """Return why a final name is taken by a file that must not be replaced; empty if none is."""
    outputs = record.outputs if record is not None else []
    ours = {output.name for output in outputs if intact or is_intact(output, workspace.root)}
    taken = next((file for file in files if file.exists() and workspace.name_of(file) not in ours), None)
    if taken is None:
        return ""
    known = any(output.name == workspace.name_of(taken) for output in outputs)
    try:
        read_header(taken)
        how = "was changed since it was made" if known else "is there and was not made by this workspace"
    except InvalidDataError as error:
        how = f"is there but damaged ({error.why})"
    return f"{taken.name} {how}"


@contextmanager
def _real_or_stand_in(matrix: MatrixFile | None, expected: ExpectedMatrix | None) -> Iterator[Path | None]:
    """Yield the imatrix for dry runs. A stand-in has the expected names, because ``--include-weights`` chooses among them."""
    if matrix is not None:
        yield matrix.path
    elif expected is None or not expected.sizes:
        yield None
    else:
        with scratch_folder() as folder:
            path = folder / "imatrix.gguf"
            entry = MatrixEntry(np.ones((1, 1)), np.ones(1, np.int64))
            write_gguf(Matrix(dict.fromkeys(sorted(expected.sizes), entry), 512, 1, ("stand-in",)), path)
            yield path


def _further(request: LevelsRequest) -> str:
    """Return what else decides a level's bytes: the content of the file of types."""
    path = request.options.tensor_type_file
    return f"--tensor-type-file sha256:{sha256(path)}" if path is not None else ""
