"""Levels: plan them all from llama.cpp's dry runs, then write, verify and name each."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import psutil

from imatrix_runner.engines.base import Quantized, QuantizeJob, QuantizeOptions
from imatrix_runner.errors import InterruptedRunError, InvalidDataError, NoSpaceError, RunnerError, from_os_error
from imatrix_runner.events import Finished, Saved, Sink, Started
from imatrix_runner.files import free_bytes, human_bytes, sha256, stamp
from imatrix_runner.imatrix.formats import MatrixFile, write_gguf
from imatrix_runner.imatrix.matrix import Entry, Matrix
from imatrix_runner.journal import Journal, Output, Record, is_intact
from imatrix_runner.models.gguf_file import read_header
from imatrix_runner.quantize.levels import Level
from imatrix_runner.quantize.recipe import NEVER_WEIGHED, Weights, buffer_bytes, usable_weights
from imatrix_runner.quantize.resolve import FAIL, Resolved, Resolver
from imatrix_runner.quantize.verify import verify_output
from imatrix_runner.workflow.context import Session
from imatrix_runner.workflow.plan import (
    LevelStep,
    facts_of,
    level_inputs,
    needs_dry_run,
    order_levels,
    plan_jobs,
    plan_level,
    step_name,
)
from imatrix_runner.workflow.request import LevelsRequest
from imatrix_runner.workflow.source import Frozen
from imatrix_runner.workspace import Workspace

Status = Literal["done", "skipped", "failed"]


@dataclass(frozen=True)
class LevelResult:
    """What became of one level. ``error`` is set when it failed."""

    step: LevelStep
    status: Status
    n_bytes: int | None
    seconds: float
    error: RunnerError | None = None
    without_weights: tuple[str, ...] = ()


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

    def plan(self, levels: Sequence[Level], matrix: MatrixFile | None, fingerprint: str) -> tuple[LevelStep, ...]:
        """Plan every level. Without ``matrix`` but with a fingerprint other than ``none`` a stand-in takes the imatrix's
        place: only its presence changes llama.cpp's choice of types."""
        with _real_or_stand_in(matrix, fingerprint) as imatrix:
            resolver = Resolver(
                self.frozen.model,
                self.session.engine,
                self.request.options,
                imatrix,
                self.weights(matrix),
                pending=matrix is None and imatrix is not None,
                uncovered=self.request.uncovered,
            )
            drafts = [self._draft(level, fingerprint) for level in levels]
            unknown = [draft.level for draft in drafts if draft.unknown or resolver.uncovered != FAIL]
            resolver = resolver.asked(unknown, self.session.log("plan"))
            with ThreadPoolExecutor(max_workers=max(1, psutil.cpu_count() or 1)) as pool:
                return tuple(pool.map(lambda draft: self._plan(draft, resolver, fingerprint), drafts))

    def weights(self, matrix: MatrixFile | None) -> Weights | None:
        """The entries llama.cpp will use; None where there are none."""
        if matrix is None:
            return None
        weights = usable_weights(matrix.matrix, matrix.path, self.request.options)
        return weights if weights.sizes else None

    def _draft(self, level: Level, fingerprint: str, options: QuantizeOptions | None = None) -> _Draft:
        """What can be said of a level without asking llama.cpp."""
        workspace, journal, name = self.session.workspace, self.session.journal, step_name(level)
        inputs = level_inputs(
            level,
            options or self.request.options,
            source=self.frozen.fingerprint,
            imatrix=fingerprint,
            engine=self.session.engine.identity(),
            further=_further(self.request),
        )
        record = journal.get(name)
        intact = record is not None and _still_there(record, workspace, journal, name, save=not self.session.dry_run)
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
        return replace(step, reason=foreign) if foreign and step.state == "fails" and not hopeless else step

    def _resolve(self, level: Level, resolver: Resolver) -> Resolved:
        self.session.stop.check()
        return resolver.resolve(level, self.session.log(step_name(level)))

    def run(self, steps: Sequence[LevelStep], matrix: MatrixFile | None, sink: Sink) -> list[LevelResult]:
        """Make the levels, several at once where memory allows. A failed level does not stop the others; a full disk, a
        changed model or a stop ends them all."""
        todo = order_levels(steps)
        memory = buffer_bytes(self.frozen.model.tensors, self.request.options.max_buffer_size)
        cores = psutil.cpu_count() or 1
        jobs = plan_jobs(self.request.jobs, len(todo), memory, psutil.virtual_memory().available, cores)
        threads = self.request.threads or max(1, cores // jobs)
        try:
            with ThreadPoolExecutor(max_workers=jobs) as pool:
                waiting: list[Future[LevelResult]] = [pool.submit(self._make, step, matrix, threads, sink) for step in todo]
                try:
                    return [future.result() for future in as_completed(waiting)]
                except BaseException:
                    self.session.stop.request()
                    for future in waiting:
                        future.cancel()
                    raise
        finally:
            shutil.rmtree(self.session.workspace.partial, ignore_errors=True)

    def _make(self, step: LevelStep, matrix: MatrixFile | None, threads: int, sink: Sink) -> LevelResult:
        self.session.stop.check()
        assert step.resolved is not None
        began = time.monotonic()
        sink(Started(step.step, step.level.name, step.resolved.recipe.n_elements, "weights"))
        try:
            job = self._job(step, step.resolved, matrix, threads)
            quantized = self.session.engine.quantize(job, sink)
            n_bytes = self._finish(step, step.resolved, matrix, job, quantized)
        except InterruptedRunError:
            raise
        except NoSpaceError as error:
            raise _disk_full(step, self.session.workspace) from error
        except RunnerError as error:
            seconds = time.monotonic() - began
            sink(Finished(step.step, "failed", error.why, seconds))
            self.frozen.check_unchanged()  # then every other level would fail too, and for this reason
            return LevelResult(step, "failed", None, seconds, error)
        seconds = time.monotonic() - began
        for file in step.files:
            sink(Saved(str(file), step.level.name, file.stat().st_size))
        sink(Finished(step.step, "done", human_bytes(n_bytes), seconds))
        expected = tuple(name for name in quantized.without_weights if name not in NEVER_WEIGHED)
        return LevelResult(step, "done", n_bytes, seconds, without_weights=expected)

    def _job(self, step: LevelStep, resolved: Resolved, matrix: MatrixFile | None, threads: int) -> QuantizeJob:
        """What the engine is told, with an empty folder of the level's own to write to."""
        folder = self.session.workspace.partial / step.level.name
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise from_os_error(error, f"preparing {step.level.name}", folder) from error
        name = f"{self.session.workspace.model}-{step.level.name}.gguf"
        return QuantizeJob(
            step.step,
            self.frozen.model.path,
            folder / name,
            step.level.ftype,
            resolved.options,
            matrix.path if matrix else None,
            threads,
            self.session.log(step.step),
        )

    def _finish(
        self, step: LevelStep, resolved: Resolved, matrix: MatrixFile | None, job: QuantizeJob, quantized: Quantized
    ) -> int:
        """Verify what was written and give it its name; its bytes."""
        self.frozen.check_unchanged()
        parts = sorted(job.out.parent.glob("*.gguf"))
        if [part.name for part in parts] != [file.name for file in step.files]:
            raise InvalidDataError(
                f"{step.files[0].name} was not written as planned",
                f"the engine left {', '.join(part.name for part in parts) or 'nothing'}",
                f"Read the log: {job.log}",
            )
        n_bytes = verify_output(parts, resolved.recipe, self.weights(matrix))
        hashes = [sha256(part, lambda _bytes: self.session.stop.check()) for part in parts]
        facts = replace(facts_of(resolved), n_bytes=n_bytes)
        self._conclude(step, job, parts, hashes, quantized, msgspec.to_builtins(facts))
        return n_bytes

    def _conclude(
        self,
        step: LevelStep,
        job: QuantizeJob,
        parts: Sequence[Path],
        hashes: Sequence[str],
        quantized: Quantized,
        facts: object,
    ) -> None:
        outputs = [Output(part.name, stamp(part), digest) for part, digest in zip(parts, hashes, strict=True)]
        command = self.session.engine.command(replace(job, out=step.files[0]))
        record = Record.now(step.inputs, outputs, step.reason, quantized.seconds, command=command, facts={"level": facts})
        self.session.journal.conclude(step.step, record, list(zip(parts, step.files, strict=True)))


def final_files(workspace: Workspace, level: Level, frozen: Frozen, *, keep_split: bool) -> tuple[Path, ...]:
    """The files a level gives: one, or with ``--keep-split`` as many shards as the source has."""
    single = workspace.level_file(level.name)
    count = len(frozen.model.files)
    if not keep_split:
        return (single,)
    return tuple(single.with_name(f"{single.stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1))


def _disk_full(step: LevelStep, workspace: Workspace) -> NoSpaceError:
    """The disk became full while a level was written: whoever noticed it, these are the figures that help."""
    return NoSpaceError(
        f"The disk became full while {step.level.name} was made",
        f"{human_bytes(step.facts.n_bytes or 0)} needed, {human_bytes(free_bytes(workspace.root))} free at {workspace.root}",
        "Free some space, or choose another disk with --work-dir, then run the same command again: it continues.",
    )


def skipped(step: LevelStep) -> LevelResult:
    return LevelResult(step, "skipped", step.facts.n_bytes, 0.0)


def refused(step: LevelStep) -> LevelResult:
    """The result of a level that the plan already knew would fail."""
    error = InvalidDataError(
        f"{step.level.name} was not made",
        step.reason,
        "See the plan with --dry-run; leave the level out or give what it needs.",
    )
    return LevelResult(step, "failed", None, 0.0, error)


def _still_there(record: Record, workspace: Workspace, journal: Journal, step: str, *, save: bool) -> bool:
    """Whether the recorded files are what they were: by stamp, or (a copied or restored workspace) by content."""
    fresh: list[Output] = []
    for output in record.outputs:
        path = workspace.root / output.name
        if not path.is_file():
            return False
        now = stamp(path)
        if now != output.stamp and (now.size != output.stamp.size or sha256(path) != output.sha256):
            return False
        fresh.append(replace(output, stamp=now))
    if fresh != record.outputs and save:
        journal.record(step, replace(record, outputs=fresh))
    return True


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
    return f"{taken.name} {how}; move it away or delete it to have it made"


@contextmanager
def _real_or_stand_in(matrix: MatrixFile | None, fingerprint: str) -> Iterator[Path | None]:
    if matrix is not None:
        yield matrix.path
    elif fingerprint == "none":
        yield None
    else:
        with tempfile.TemporaryDirectory(prefix="imatrix-runner-") as folder:
            path = Path(folder) / "imatrix.gguf"
            entry = Entry(np.ones((1, 1)), np.ones(1, np.int64))
            write_gguf(Matrix({"blk.0.stand_in.weight": entry}, 512, 1, ("stand-in",)), path)
            yield path


def _further(request: LevelsRequest) -> str:
    """What else decides a level's bytes: the content of the file of types."""
    path = request.options.tensor_type_file
    return f"--tensor-type-file sha256:{sha256(path)}" if path is not None else ""
