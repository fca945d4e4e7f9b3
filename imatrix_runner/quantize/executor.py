"""Makes levels: all in one pass where the engine can, else one by one. Each is verified and recorded before it gets its
name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import psutil
from msgspec import UNSET

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen, hash_files
from imatrix_runner.context.requests import LevelsRequest
from imatrix_runner.engines.contract import Engine
from imatrix_runner.engines.jobs import LEDGER_NAME, CheckJob, Donor, PassedLevel, PassFigures, PassJob, PassLevel, QuantizeJob
from imatrix_runner.engines.roundings import STOCK
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError, from_os_error
from imatrix_runner.events import Finished, Saved, Sink, Started, ignore, info, warning
from imatrix_runner.files import free_bytes, human_bytes, sha256, stamp
from imatrix_runner.imatrix.covariances import CovarianceSet
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.journal import StepOutput, StepRecord, outputs_intact
from imatrix_runner.models.gguf_file import unknown_types
from imatrix_runner.quantize.build_recipe import RecipeFile, recipe_of_level, recipe_path, write_build_recipe
from imatrix_runner.quantize.copy_finished import Copier, alike
from imatrix_runner.quantize.disk_room import disk_full, explained, reserved_bytes
from imatrix_runner.quantize.level_facts import MadeFacts
from imatrix_runner.quantize.level_files import finished_files, keep_ledger
from imatrix_runner.quantize.pass_levels import buffer_bytes as pass_buffer
from imatrix_runner.quantize.pass_levels import donor, lineage, pass_level
from imatrix_runner.quantize.plan import LevelStep, facts_of, order_levels, plan_jobs
from imatrix_runner.quantize.recipe import buffer_bytes
from imatrix_runner.quantize.resolve import Resolved
from imatrix_runner.quantize.usable_imatrix import NEVER_WEIGHED, UsableImatrix
from imatrix_runner.quantize.verify import verify_output

Status = Literal["done", "skipped", "failed"]

STEP = "levels"

T = TypeVar("T")


@dataclass(frozen=True)
class LevelResult:
    """The result of one level. ``seconds`` from the start of the level (or of its pass) until it had its name;
    ``share``: its share of the work of a pass with several levels; ``copied_from``: the level of the same
    tensors that it was copied from; ``error`` is set when it failed."""

    step: LevelStep
    status: Status
    n_bytes: int | None
    seconds: float
    error: RunnerError | None = None
    without_weights: tuple[str, ...] = ()
    share: float | None = None
    copied_from: str = ""


def skipped(step: LevelStep) -> LevelResult:
    return LevelResult(step, "skipped", step.facts.n_bytes, 0.0)


def refused(step: LevelStep) -> LevelResult:
    """Return the result of a level that fails according to the plan."""
    error = InvalidDataError(
        f"{step.level.name} was not made",
        step.reason,
        step.remedy or "See the plan with --dry-run; leave the level out or give what it needs.",
    )
    return LevelResult(step, "failed", None, 0.0, error)


@dataclass(frozen=True)
class MadeLevels:
    """The result of each level, and the figures of every pass."""

    results: tuple[LevelResult, ...]
    passes: tuple[PassFigures, ...]


@dataclass(frozen=True)
class _Written:
    """A level on the disk that is not verified yet: its files, in order, and how they were made."""

    parts: tuple[Path, ...]
    job: QuantizeJob
    engine: Engine
    seconds: float
    without_weights: tuple[str, ...]
    share: float | None = None
    copied_from: str = ""
    without_feedback: tuple[str, ...] = ()


def _nobody(_level: str) -> None:
    """Called with a level's name where nobody waits for it."""


@dataclass(frozen=True)
class LevelMaker:
    """Makes the levels of one request from one model and one imatrix. ``covariances``: for levels that are rounded with error
    feedback. ``on_made`` is called with the name of each level that is finished, from the thread that verified it."""

    request: LevelsRequest
    frozen: Frozen
    session: Session
    matrix: MatrixFile | None
    weights: UsableImatrix | None
    sink: Sink = field(repr=False)
    covariances: CovarianceSet | None = None
    on_made: Callable[[str], None] = field(default=_nobody, repr=False)

    def run(self, steps: Sequence[LevelStep]) -> MadeLevels:
        """Make the levels. A failed one does not stop the others; a full disk, a changed model or a stop ends them all, and
        leaves what the next run can continue."""
        together = [step for step in steps if self.session.engine_for(step.level.name).one_pass is not None]
        alone = [step for step in steps if step not in together]
        results: list[LevelResult] = []
        passes: list[PassFigures] = []
        self._free_others(together)
        try:
            for group in self._groups(together):
                made, figures = self._pass(group)
                results += made
                passes.append(figures)
            results += self._one_by_one(alone)
        finally:
            self._free_others(together)  # half-written files of a program cannot be continued
        shutil.rmtree(self.session.workspace.partial, ignore_errors=True)
        return MadeLevels(tuple(results), tuple(passes))

    def _groups(self, steps: Sequence[LevelStep]) -> Iterator[Sequence[LevelStep]]:
        """Return the passes: one with all levels, or one for each, the smallest first, so that most are made before space runs
        out. Later passes copy what earlier ones computed."""
        if not self.request.one_by_one:
            yield from [steps] if steps else []
            return
        for step in reversed(order_levels(steps)):
            self._require_space(step)
            yield [step]

    def _free_others(self, steps: Sequence[LevelStep]) -> None:
        """Remove unfinished files of other levels, which only take space."""
        wanted = {step.level.name for step in steps}
        partial = self.session.workspace.partial
        for folder in partial.iterdir() if partial.is_dir() else ():
            if folder.name not in wanted:
                if (folder / LEDGER_NAME).exists():
                    self.sink(info(f"The unfinished files of {folder.name} are removed: it was not requested now."))
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it is gone, or not empty
                folder.rmdir()
        with suppress(OSError):
            partial.rmdir()

    def _require_space(self, step: LevelStep) -> None:
        need, root = step.facts.n_bytes or 0, self.session.workspace.root
        if need > free_bytes(root) + reserved_bytes(self.session.workspace, [step.level.name]):
            raise disk_full([step], self.session.workspace)

    def _pass(self, steps: Sequence[LevelStep]) -> tuple[list[LevelResult], PassFigures]:
        """Make all of these in one reading of the model."""
        engine = self.session.engine_for(steps[0].level.name)
        assert engine.one_pass is not None
        began = time.monotonic()
        levels = [self._pass_level(step) for step in steps]
        job = PassJob(
            STEP,
            self.frozen.model.files,
            tuple(levels),
            self._donors(),
            lineage(self.frozen.fingerprint, engine.identity()),
            self.matrix.path if self.matrix else None,
            self.request.threads,
            pass_buffer(self.request.options.max_buffer_size),
            self.session.log(STEP),
            native_kernels=self.request.kernels == "auto",
            covariances=self.covariances.folder if self.covariances is not None else None,
        )
        names = steps[0].level.name if len(steps) == 1 else f"{len(steps)} levels in one pass"
        self.sink(Started(STEP, names, None, "weights"))
        try:
            passed, figures = engine.one_pass(job, self.sink)
        except NoSpaceError as error:
            raise explained(error, steps, self.session.workspace) from error
        self.frozen.check_unchanged()
        spoiled = sum(bool(level.why) for level in passed)
        summary = f"{len(steps) - spoiled} of {len(steps)} written" if spoiled else _summary(passed, figures)
        self.sink(Finished(STEP, "failed" if spoiled == len(steps) else "done", summary, figures.seconds))
        written = {level.name: level for level in passed}
        shares = figures.shares if len(steps) > 1 else {}

        def finish(step: LevelStep, job: QuantizeJob) -> LevelResult:
            level = written[step.level.name]

            def write() -> _Written:
                if level.why:
                    raise _spoiled(step, level.tensor, level.why)
                share = shares.get(step.level.name)
                if level.without_feedback:
                    self.sink(warning(_refined(step, level.without_feedback)))
                return _Written(
                    _parts(job),
                    job,
                    engine,
                    figures.seconds,
                    level.without_weights,
                    share,
                    without_feedback=level.without_feedback,
                )

            self.sink(Started(step.step, step.level.name, step.facts.n_bytes, "B"))
            return self._finish(step, began, write)

        with ThreadPoolExecutor(max(1, psutil.cpu_count() or 1)) as pool:
            made = self._all([pool.submit(finish, step, level.job) for step, level in zip(steps, levels, strict=True)])
        return made, figures

    def _pass_level(self, step: LevelStep) -> PassLevel:
        assert step.resolved is not None
        covered = self.covariances.weights if self.covariances is not None else ()
        return pass_level(step.level.name, step.resolved.recipe, self._job(step, None), step.inputs, covered)

    def _donors(self) -> tuple[Donor, ...]:
        """Return every finished level whose files match the journal."""
        workspace, journal = self.session.workspace, self.session.journal
        found = [
            donor(finished_files(workspace, record), workspace.ledger(name))
            for name, record in journal.of_kind("level").items()
            if outputs_intact(record, workspace.root)
        ]
        return tuple(entry for entry in found if entry is not None)

    def _one_by_one(self, steps: Sequence[LevelStep]) -> list[LevelResult]:
        """Make each level in its own child process, several at once where memory allows; of equal ones only the first."""
        todo = alike(order_levels(steps))
        memory = buffer_bytes(self.frozen.model.tensors, self.request.options.max_buffer_size)
        cores = psutil.cpu_count() or 1
        jobs = plan_jobs(self.request.jobs, len(todo), memory, psutil.virtual_memory().available, cores)
        threads = self.request.threads or max(1, cores // jobs)
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            return [
                result for group in self._all([pool.submit(self._group, group, threads) for group in todo]) for result in group
            ]

    def _all(self, waiting: Sequence[Future[T]]) -> list[T]:
        try:
            return [future.result() for future in as_completed(waiting)]
        except BaseException:
            self.session.stop.request()
            for future in waiting:
                future.cancel()
            raise

    def _group(self, steps: Sequence[LevelStep], threads: int) -> list[LevelResult]:
        """Make levels with the same tensors one after the other, so that all but the first can be copied."""
        return [self._alone(step, threads) for step in steps]

    def _alone(self, step: LevelStep, threads: int) -> LevelResult:
        self.session.stop.check()
        job, engine = self._job(step, threads), self.session.engine_for(step.level.name)
        return self._finish(step, time.monotonic(), lambda: self._copy(step, job, engine) or self._quantize(step, job, engine))

    def _copy(self, step: LevelStep, job: QuantizeJob, engine: Engine) -> _Written | None:
        """Copy the level from a finished one that holds the same tensors; None if there is none."""
        began = time.monotonic()
        copier = Copier(self.session, self.request.options, self.weights, self.sink)
        if (original := copier.original(step)) is None:
            return None
        self.sink(Started(step.step, step.level.name, original.n_bytes, "B"))
        _empty(job.out.parent, step)
        if not copier.copy(original, step, job.out.parent):
            return None
        seconds = time.monotonic() - began
        return _Written(_parts(job), job, engine, seconds, original.without_weights, copied_from=original.name)

    def _quantize(self, step: LevelStep, job: QuantizeJob, engine: Engine) -> _Written:
        assert step.resolved is not None
        assert engine.quantize is not None
        self.sink(Started(step.step, step.level.name, step.resolved.recipe.n_elements, "weights"))
        _empty(job.out.parent, step)
        quantized = engine.quantize(job, self.sink)
        self.frozen.check_unchanged()
        return _Written(_parts(job), job, engine, quantized.seconds, quantized.without_weights)

    def _finish(self, step: LevelStep, began: float, write: Callable[[], _Written]) -> LevelResult:
        """Write a level, verify it and give it its name. An error that concerns only this level becomes its result."""
        assert step.resolved is not None
        try:
            written = write()
            n_bytes = self._verify(step, step.resolved, written)
        except InterruptedRunError:
            raise
        except NoSpaceError as error:
            raise explained(error, [step], self.session.workspace) from error
        except RunnerError as error:
            seconds = time.monotonic() - began
            self.sink(Finished(step.step, "failed", error.why, seconds))
            self.frozen.check_unchanged()  # if it changed, every other level would fail too, for this reason
            return LevelResult(step, "failed", None, seconds, error)
        seconds = time.monotonic() - began
        for file in step.files:
            self.sink(Saved(str(file), step.level.name, file.stat().st_size))
        copied = f", copied from {written.copied_from}, which holds the same tensors" if written.copied_from else ""
        self.sink(Finished(step.step, "done", f"{human_bytes(n_bytes)}{copied}", seconds))
        expected = tuple(name for name in written.without_weights if name not in NEVER_WEIGHED)
        self.on_made(step.level.name)
        result = LevelResult(step, "done", n_bytes, seconds, without_weights=expected, share=written.share)
        return replace(result, copied_from=written.copied_from)

    def _job(self, step: LevelStep, threads: int | None) -> QuantizeJob:
        """Return the job with llama-quantize's options, and the level's own folder to write to."""
        assert step.resolved is not None
        workspace = self.session.workspace
        return QuantizeJob(
            step.step,
            self.frozen.model.path,
            workspace.partial / step.level.name / workspace.level_file(step.level.name).name,
            step.level.ftype,
            step.resolved.options,
            self.matrix.path if self.matrix else None,
            threads,
            self.session.log(step.step),
            step.resolved.recipe.shards,
        )

    def _verify(self, step: LevelStep, resolved: Resolved, written: _Written) -> int:
        """Verify the written files and give them their names; return their size in bytes."""
        parts = written.parts
        if [part.name for part in parts] != [file.name for file in step.files]:
            raise InvalidDataError(
                f"{step.files[0].name} was not written as planned",
                f"the engine left {', '.join(part.name for part in parts) or 'nothing'}",
                f"Read the log: {written.job.log}",
            )
        weights = self.weights.without(step.level.exclude_weights) if self.weights is not None else None
        n_bytes = verify_output(parts, resolved.recipe, weights)
        self._check_rows(step, written)

        hashes = [sha256(part, lambda _bytes: self.session.stop.check()) for part in parts]
        level = replace(facts_of(resolved), n_bytes=n_bytes)
        facts = MadeFacts(
            level,
            written.share,
            written.without_weights,
            written.copied_from or UNSET,
            step.level.ftype,
            step.level.rounding if step.level.rounding != STOCK else UNSET,
            written.without_feedback or UNSET,
        )
        names = [self.session.workspace.name_of(file) for file in step.files]
        outputs = [StepOutput(*made) for made in zip(names, map(stamp, parts), hashes, strict=True)]
        commands = written.engine.commands(replace(written.job, out=self.session.workspace.level_file(step.level.name)))
        record = StepRecord.now(step.inputs, outputs, step.reason, written.seconds, commands=commands, facts=facts)
        self._write_recipe(step, written, hashes)
        self.session.journal.conclude(step.step, record, list(zip(parts, step.files, strict=True)))
        keep_ledger(self.session.workspace, step.level.name, written.job.out.parent)
        return n_bytes

    def _write_recipe(self, step: LevelStep, written: _Written, hashes: Sequence[str]) -> None:
        """Write how the level was made next to where it will be."""
        sizes = [part.stat().st_size for part in written.parts]
        files = [RecipeFile(*made) for made in zip((part.name for part in written.parts), sizes, hashes, strict=True)]
        matrix = (self.matrix.path,) if self.matrix is not None else ()
        hashed = hash_files((*self.frozen.model.files, *matrix), self.session)
        inputs = [
            RecipeFile(path.name, path.stat().st_size, digest)
            for path, digest in zip((*self.frozen.model.files, *matrix), hashed, strict=True)
        ]
        source = inputs[: len(self.frozen.model.files)]
        imatrix = inputs[-1] if matrix else None
        used = self.covariances.fingerprint if self.covariances is not None else ""
        recipe = recipe_of_level(self._pass_level(step), files, source, imatrix, written.engine.identity(), used)
        path = recipe_path(self.session.workspace.level_file(step.level.name))
        if not write_build_recipe(path, recipe):
            self.sink(warning(f"{path.name} is not written: a file that was not made here has this name."))

    def _check_rows(self, step: LevelStep, written: _Written) -> None:
        """Check every row as it is on the disk (``--verify full``)."""
        if self.session.checker is None:
            return
        if strange := [name for part in written.parts for name in unknown_types(part)]:
            types = ", ".join(dict.fromkeys(strange))
            self.sink(
                warning(
                    f"{step.level.name}: its rows are not checked: only the engine that made them knows their types ({types})."
                )
            )
            return
        ledger = written.job.out.parent / LEDGER_NAME
        job = CheckJob(step.step, written.parts, ledger if ledger.exists() else None, written.job.threads, written.job.log)
        tensor, why = self.session.checker.check(job, ignore)
        if why:
            raise InvalidDataError(
                f"The {step.level.name} file is damaged",
                f"{tensor}: {why}",
                "Run the same command again; if it happens again, check the disk.",
            )


def _refined(step: LevelStep, names: Sequence[str]) -> str:
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{step.level.name}: {some} could not be rounded with error feedback, and are refined: their inputs hardly vary."


def _parts(job: QuantizeJob) -> tuple[Path, ...]:
    return tuple(sorted(job.out.parent.glob("*.gguf")))


def _empty(folder: Path, step: LevelStep) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise from_os_error(error, f"preparing {step.level.name}", folder) from error


def _summary(passed: Sequence[PassedLevel], figures: PassFigures) -> str:
    """``406 tensors computed for 780, 120 copied``: tensors of the model against tensors of all levels."""
    pairs = sum(cost.pairs for cost in figures.types)
    computed, copied, kept = (sum(getattr(level, name) for level in passed) for name in ("computed", "copied", "kept"))
    words = [f"{pairs} tensors computed for {computed}", f"{copied} copied", f"{kept} kept"]
    return ", ".join(word for word, count in zip(words, (computed, copied, kept), strict=True) if count) or "nothing to do"


def _spoiled(step: LevelStep, tensor: str, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{step.level.name} was not made",
        f"{tensor}: {why}",
        "Check the model's file: download or convert it again.",
    )
