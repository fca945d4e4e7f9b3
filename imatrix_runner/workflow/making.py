"""Levels are made: all at once where the engine can, else one by one; each is verified and recorded before it gets its name."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import psutil

from imatrix_runner.engines.base import (
    LEDGER_NAME,
    CheckJob,
    Donor,
    Engine,
    PassedLevel,
    PassFigures,
    PassJob,
    PassLevel,
    QuantizeJob,
)
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError, from_os_error
from imatrix_runner.events import Finished, Saved, Sink, Started, ignore, info, warning
from imatrix_runner.files import free_bytes, human_bytes, sha256, stamp
from imatrix_runner.imatrix.formats import MatrixFile
from imatrix_runner.journal import Output, Record, outputs_intact
from imatrix_runner.models.gguf_file import unknown_types
from imatrix_runner.quantize.recipe import buffer_bytes
from imatrix_runner.quantize.resolve import Resolved
from imatrix_runner.quantize.single_pass import buffer_bytes as pass_buffer
from imatrix_runner.quantize.single_pass import donor, lineage, pass_level
from imatrix_runner.quantize.verify import verify_output
from imatrix_runner.quantize.weights import NEVER_WEIGHED, Weights
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.plan import LevelStep, facts_of, order_levels, plan_jobs
from imatrix_runner.workflow.request import LevelsRequest
from imatrix_runner.workflow.source import Frozen
from imatrix_runner.workspace import Workspace

Status = Literal["done", "skipped", "failed"]

STEP = "levels"


@dataclass(frozen=True)
class LevelResult:
    """What became of one level. ``seconds`` from the beginning of its making (with others: of the pass) until it had its name;
    ``share``: its part of the work of a pass, where several levels were made in one; ``error`` is set when it failed."""

    step: LevelStep
    status: Status
    n_bytes: int | None
    seconds: float
    error: RunnerError | None = None
    without_weights: tuple[str, ...] = ()
    share: float | None = None


def skipped(step: LevelStep) -> LevelResult:
    return LevelResult(step, "skipped", step.facts.n_bytes, 0.0)


def refused(step: LevelStep) -> LevelResult:
    """The result of a level that the plan already knew would fail."""
    error = InvalidDataError(
        f"{step.level.name} was not made",
        step.reason,
        step.remedy or "See the plan with --dry-run; leave the level out or give what it needs.",
    )
    return LevelResult(step, "failed", None, 0.0, error)


@dataclass(frozen=True)
class MadeLevels:
    """What became of each level, and the figures of every pass."""

    results: tuple[LevelResult, ...]
    passes: tuple[PassFigures, ...]


@dataclass(frozen=True)
class _Written:
    """A level that is on the disk, unverified: the files, in order, and how they were made."""

    parts: tuple[Path, ...]
    job: QuantizeJob
    engine: Engine
    seconds: float
    without_weights: tuple[str, ...]
    share: float | None = None


@dataclass(frozen=True)
class LevelMaker:
    """Makes the levels of one request from one model and one imatrix."""

    request: LevelsRequest
    frozen: Frozen
    session: Session
    matrix: MatrixFile | None
    weights: Weights | None
    sink: Sink = field(repr=False)

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
            self._free_others(together)  # what a program wrote half cannot be continued
        shutil.rmtree(self.session.workspace.partial, ignore_errors=True)
        return MadeLevels(tuple(results), tuple(passes))

    def _groups(self, steps: Sequence[LevelStep]) -> Iterator[Sequence[LevelStep]]:
        """The passes: one with all levels, or one for each, the smallest first, so that most are made when space runs out.
        Later ones copy what earlier ones computed."""
        if not self.request.one_by_one:
            yield from [steps] if steps else []
            return
        for step in reversed(order_levels(steps)):
            self._require_space(step)
            yield [step]

    def _free_others(self, steps: Sequence[LevelStep]) -> None:
        """Half files of other levels would only take space."""
        wanted = {step.level.name for step in steps}
        partial = self.session.workspace.partial
        for folder in partial.iterdir() if partial.is_dir() else ():
            if folder.name not in wanted:
                if (folder / LEDGER_NAME).exists():
                    self.sink(info(f"What was unfinished of {folder.name} is removed: it is not asked for now."))
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # it is gone, or something is in it
                folder.rmdir()
        with suppress(OSError):
            partial.rmdir()

    def _require_space(self, step: LevelStep) -> None:
        need, root = step.facts.n_bytes or 0, self.session.workspace.root
        if need > free_bytes(root) + reserved_bytes(self.session.workspace, [step.level.name]):
            raise _disk_full([step], self.session.workspace)

    def _pass(self, steps: Sequence[LevelStep]) -> tuple[list[LevelResult], PassFigures]:
        """All of these in one reading of the model."""
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
            own_kernels=self.request.kernels == "auto",
        )
        names = steps[0].level.name if len(steps) == 1 else f"{len(steps)} levels in one pass"
        self.sink(Started(STEP, names, None, "weights"))
        try:
            passed, figures = engine.one_pass(job, self.sink)
        except NoSpaceError as error:
            raise _explained(error, steps, self.session.workspace) from error
        self.frozen.check_unchanged()
        spoiled = sum(bool(level.why) for level in passed)
        told = f"{len(steps) - spoiled} of {len(steps)} written" if spoiled else _told(passed, figures)
        self.sink(Finished(STEP, "failed" if spoiled == len(steps) else "done", told, figures.seconds))
        written = {level.name: level for level in passed}
        shares = figures.shares if len(steps) > 1 else {}

        def finish(step: LevelStep, job: QuantizeJob) -> LevelResult:
            level = written[step.level.name]

            def write() -> _Written:
                if level.why:
                    raise _spoiled(step, level.tensor, level.why)
                share = shares.get(step.level.name)
                return _Written(_parts(job), job, engine, figures.seconds, level.without_weights, share)

            self.sink(Started(step.step, step.level.name, step.facts.n_bytes, "B"))
            return self._finish(step, began, write)

        with ThreadPoolExecutor(max(1, psutil.cpu_count() or 1)) as pool:
            made = self._all([pool.submit(finish, step, level.job) for step, level in zip(steps, levels, strict=True)])
        return made, figures

    def _pass_level(self, step: LevelStep) -> PassLevel:
        assert step.resolved is not None
        return pass_level(step.level.name, step.resolved.recipe, self._job(step, None), step.inputs)

    def _donors(self) -> tuple[Donor, ...]:
        """Every finished level whose files are still what the journal says."""
        workspace, journal = self.session.workspace, self.session.journal
        found = [
            donor([workspace.root / output.name for output in record.outputs], workspace.ledger(step.removeprefix("level-")))
            for step, record in journal.steps().items()
            if step.startswith("level-") and outputs_intact(record, workspace.root)
        ]
        return tuple(entry for entry in found if entry is not None)

    def _one_by_one(self, steps: Sequence[LevelStep]) -> list[LevelResult]:
        """Each in a child process of its own, several at once where memory allows."""
        todo = order_levels(steps)
        memory = buffer_bytes(self.frozen.model.tensors, self.request.options.max_buffer_size)
        cores = psutil.cpu_count() or 1
        jobs = plan_jobs(self.request.jobs, len(todo), memory, psutil.virtual_memory().available, cores)
        threads = self.request.threads or max(1, cores // jobs)
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            return self._all([pool.submit(self._alone, step, threads) for step in todo])

    def _all(self, waiting: Sequence[Future[LevelResult]]) -> list[LevelResult]:
        try:
            return [future.result() for future in as_completed(waiting)]
        except BaseException:
            self.session.stop.request()
            for future in waiting:
                future.cancel()
            raise

    def _alone(self, step: LevelStep, threads: int) -> LevelResult:
        self.session.stop.check()
        assert step.resolved is not None
        began = time.monotonic()
        self.sink(Started(step.step, step.level.name, step.resolved.recipe.n_elements, "weights"))

        def write() -> _Written:
            job, engine = self._job(step, threads), self.session.engine_for(step.level.name)
            _empty(job.out.parent, step)
            quantized = engine.quantize(job, self.sink)
            self.frozen.check_unchanged()
            return _Written(_parts(job), job, engine, quantized.seconds, quantized.without_weights)

        return self._finish(step, began, write)

    def _finish(self, step: LevelStep, began: float, write: Callable[[], _Written]) -> LevelResult:
        """From what was written to a verified file with its name; an error that concerns only this level is its result."""
        assert step.resolved is not None
        try:
            written = write()
            n_bytes = self._verify(step, step.resolved, written)
        except InterruptedRunError:
            raise
        except NoSpaceError as error:
            raise _explained(error, [step], self.session.workspace) from error
        except RunnerError as error:
            seconds = time.monotonic() - began
            self.sink(Finished(step.step, "failed", error.why, seconds))
            self.frozen.check_unchanged()  # then every other level would fail too, and for this reason
            return LevelResult(step, "failed", None, seconds, error)
        seconds = time.monotonic() - began
        for file in step.files:
            self.sink(Saved(str(file), step.level.name, file.stat().st_size))
        self.sink(Finished(step.step, "done", human_bytes(n_bytes), seconds))
        expected = tuple(name for name in written.without_weights if name not in NEVER_WEIGHED)
        return LevelResult(step, "done", n_bytes, seconds, without_weights=expected, share=written.share)

    def _job(self, step: LevelStep, threads: int | None) -> QuantizeJob:
        """What llama-quantize would be told, with a folder of the level's own to write to."""
        assert step.resolved is not None
        workspace = self.session.workspace
        return QuantizeJob(
            step.step,
            self.frozen.model.path,
            workspace.partial / step.level.name / f"{workspace.model}-{step.level.name}.gguf",
            step.level.ftype,
            step.resolved.options,
            self.matrix.path if self.matrix else None,
            threads,
            self.session.log(step.step),
        )

    def _verify(self, step: LevelStep, resolved: Resolved, written: _Written) -> int:
        """Verify what was written and give it its name; its bytes."""
        parts = written.parts
        if [part.name for part in parts] != [file.name for file in step.files]:
            raise InvalidDataError(
                f"{step.files[0].name} was not written as planned",
                f"the engine left {', '.join(part.name for part in parts) or 'nothing'}",
                f"Read the log: {written.job.log}",
            )
        n_bytes = verify_output(parts, resolved.recipe, self.weights)
        self._check_rows(step, written)

        hashes = [sha256(part, lambda _bytes: self.session.stop.check()) for part in parts]
        facts = msgspec.to_builtins(replace(facts_of(resolved), n_bytes=n_bytes))
        outputs = [Output(part.name, stamp(part), digest) for part, digest in zip(parts, hashes, strict=True)]
        command = written.engine.command(replace(written.job, out=step.files[0]))
        told = {"level": facts, "share": written.share}
        record = Record.now(step.inputs, outputs, step.reason, written.seconds, command=command, facts=told)
        self.session.journal.conclude(step.step, record, list(zip(parts, step.files, strict=True)))
        self._keep_ledger(step, written)
        return n_bytes

    def _check_rows(self, step: LevelStep, written: _Written) -> None:
        """``--verify full``: every row as it lies on the disk."""
        if self.session.checker is None:
            return
        if strange := [name for part in written.parts for name in unknown_types(part)]:
            types = ", ".join(dict.fromkeys(strange))
            self.sink(
                warning(f"{step.level.name}: its rows are not checked, because only its maker knows their types ({types}).")
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

    def _keep_ledger(self, step: LevelStep, written: _Written) -> None:
        """How every tensor came to be: for levels that are made later and share some."""
        ledger, kept = written.job.out.parent / LEDGER_NAME, self.session.workspace.ledger(step.level.name)
        try:
            kept.unlink(missing_ok=True)
            if ledger.exists():
                kept.parent.mkdir(exist_ok=True)
                ledger.replace(kept)
        except OSError as error:
            raise from_os_error(error, f"keeping the ledger of {step.level.name}", kept) from error


def _parts(job: QuantizeJob) -> tuple[Path, ...]:
    return tuple(sorted(job.out.parent.glob("*.gguf")))


def _empty(folder: Path, step: LevelStep) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise from_os_error(error, f"preparing {step.level.name}", folder) from error


def _told(passed: Sequence[PassedLevel], figures: PassFigures) -> str:
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


def reserved_bytes(workspace: Workspace, levels: Sequence[str] | None = None) -> int:
    """What half files of these levels (of all) take already: it will be used for them, or freed."""
    folders = workspace.partial.iterdir() if workspace.partial.is_dir() else ()
    wanted = [folder for folder in folders if levels is None or folder.name in levels]
    return sum(file.stat().st_size for folder in wanted for file in folder.glob("*.gguf"))


def _explained(error: NoSpaceError, steps: Sequence[LevelStep], workspace: Workspace) -> NoSpaceError:
    """The error with the figures that help; as it is where enough is free: then it is a quota that was used up."""
    return error if _needed(steps, workspace) <= free_bytes(workspace.root) else _disk_full(steps, workspace)


def _needed(steps: Sequence[LevelStep], workspace: Workspace) -> int:
    reserved = reserved_bytes(workspace, [step.level.name for step in steps])
    return max(0, sum(step.facts.n_bytes or 0 for step in steps) - reserved)


def _disk_full(steps: Sequence[LevelStep], workspace: Workspace) -> NoSpaceError:
    """The disk became full while levels were written: whoever noticed it, these are the figures that help."""
    names = steps[0].level.name if len(steps) == 1 else f"{len(steps)} levels"
    return NoSpaceError(
        f"The disk became full while {names} were made" if len(steps) > 1 else f"The disk became full while {names} was made",
        f"{human_bytes(_needed(steps, workspace))} needed, {human_bytes(free_bytes(workspace.root))} free at {workspace.root}",
        "Free some space, or choose another disk with --work-dir, then run the same command again: it continues.",
    )
