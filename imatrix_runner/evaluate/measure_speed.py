"""``--speed``: how fast the source and its levels run on this machine, recorded in the journal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from imatrix_runner.context.context import Session
from imatrix_runner.context.open_model import Frozen
from imatrix_runner.context.requests import SpeedRequest
from imatrix_runner.engines.abilities import SpeedMeter
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.speed_jobs import SpeedJob, TimedRuns, timing_words
from imatrix_runner.errors import InterruptedRunError, NoSpaceError, RunnerError, UsageError
from imatrix_runner.evaluate.measurements import SPEED_OF_SOURCE
from imatrix_runner.evaluate.speed_figures import (
    MeasuredSpeed,
    SpeedSetting,
    TokenRate,
    describe_rate,
    least_layers,
    reaches,
    shares,
)
from imatrix_runner.events import Event, Finished, Progress, Started
from imatrix_runner.journal import StepRecord, differences
from imatrix_runner.steps import LEVEL_INPUT, step_id
from imatrix_runner.toolchain.hardware import machine_fingerprint, processor_name
from imatrix_runner.untrusted import UnreadableError, as_type

N_PROMPT, N_GEN = 512, 128
"""llama-bench's tests, pp512 and tg128."""


@dataclass(frozen=True)
class TimedFile:
    """A file to time: the name of its step, the file, and a fingerprint of its content."""

    name: str
    file: Path
    content: str


def speed_meter(session: Session) -> SpeedMeter:
    """What times files. Raises :class:`UsageError` for an engine that cannot."""
    meter = session.engine.speed_meter
    if meter is None:
        raise UsageError(
            "Speed can only be measured by the embedded engine",
            f"this is the {session.engine.name} engine, whose programs do not time a prompt and generation apart",
            "Leave --engine out, or --speed and --min-speed.",
        )
    return meter


def measure_speeds(
    request: SpeedRequest,
    options: CollectOptions,
    frozen: Frozen,
    levels: Sequence[TimedFile],
    session: Session,
    *,
    again: bool,
) -> dict[str, MeasuredSpeed | RunnerError]:
    """The speed of the source (under :data:`SPEED_OF_SOURCE`) and of each level, or why it is not known. What is recorded for
    this machine with these options is not measured again, unless ``again``.

    Raises :class:`UsageError` without an engine that can measure it.
    """
    timing = _Timing(request, options, session, speed_meter(session))
    source = TimedFile(SPEED_OF_SOURCE, frozen.model.path, frozen.fingerprint)
    return timing.run((source, *levels), again=again)


def fewest_layers(
    request: SpeedRequest, options: CollectOptions, level: TimedFile, n_layers: int, least: float, session: Session
) -> int | None:
    """The least ``-ngl`` with which a level generates ``least`` tokens/s; None if it does not with all ``n_layers`` layers and
    the output. A number of layers for which there is no memory counts as not enough."""
    meter = speed_meter(session)

    def is_enough(n: int) -> bool:
        timing = _Timing(request, replace(options, n_gpu_layers=str(n)), session, meter)
        try:
            runs = timing.once(level, request.repetitions, f"{level.name} with -ngl {n}", n_prompt=0)
        except (InterruptedRunError, NoSpaceError):
            raise
        except RunnerError:
            return False
        return reaches(TokenRate.of(runs.generation), least)

    return least_layers(n_layers + 1, is_enough)


@dataclass(frozen=True)
class _Timing:
    request: SpeedRequest
    options: CollectOptions
    session: Session
    meter: SpeedMeter

    def inputs(self, file: TimedFile) -> dict[str, str]:
        """Everything that a figure depends on, and the moment's load of the machine besides."""
        return {
            LEVEL_INPUT: file.content,
            "machine": machine_fingerprint(self.session.engine.devices),
            "options": timing_words(self.options),
            "tests": f"pp{N_PROMPT} tg{N_GEN} depth {self.request.depth} repetitions {self.request.repetitions}",
            "engine": self.session.engine.arithmetic(),
        }

    def run(self, files: Sequence[TimedFile], *, again: bool) -> dict[str, MeasuredSpeed | RunnerError]:
        found: dict[str, MeasuredSpeed | RunnerError] = {}
        reasons: dict[str, str] = {}
        for file in files:
            known, reasons[file.name] = self._known(file, again)
            if known is not None:
                found[file.name] = known
        todo = [file for file in files if file.name not in found]
        found |= self._measure(todo, reasons)
        return {file.name: found[file.name] for file in files}

    def _known(self, file: TimedFile, again: bool) -> tuple[MeasuredSpeed | None, str]:
        """What is recorded for a file, else None and why it is measured."""
        record = self.session.journal.get(step_id("speed", file.name))
        if record is None:
            return None, "not measured yet"
        if changed := differences(record, self.inputs(file)):
            return None, f"changed: {', '.join(changed)}"
        if again:
            return None, "asked for"
        try:
            return as_type(record.facts, MeasuredSpeed), ""
        except UnreadableError:
            return None, "its record cannot be read"

    def _measure(self, files: Sequence[TimedFile], reasons: Mapping[str, str]) -> dict[str, MeasuredSpeed | RunnerError]:
        """Time files by turns, every other round in reverse. One that fails is left out of later rounds."""
        if not files:
            return {}
        runs: dict[str, list[TimedRuns]] = {file.name: [] for file in files}
        failed: dict[str, RunnerError] = {}
        spent = dict.fromkeys(runs, 0.0)
        for number, repetitions in enumerate(shares(self.request.repetitions)):
            for file in files if number % 2 == 0 else reversed(files):
                if file.name in failed:
                    continue
                began = time.monotonic()
                try:
                    runs[file.name].append(self.once(file, repetitions, f"{file.name} speed, round {number + 1}"))
                except (InterruptedRunError, NoSpaceError):
                    raise
                except RunnerError as error:
                    failed[file.name] = error
                spent[file.name] += time.monotonic() - began
        found: dict[str, MeasuredSpeed | RunnerError] = {}
        for file in files:
            if file.name in failed:
                found[file.name] = failed[file.name]
                continue
            speed = self._joined(runs[file.name])
            found[file.name] = speed
            record = StepRecord.now(self.inputs(file), [], reasons[file.name], spent[file.name], facts=speed)
            self.session.journal.record(step_id("speed", file.name), record)
        return found

    def once(self, file: TimedFile, repetitions: int, title: str, *, n_prompt: int = N_PROMPT) -> TimedRuns:
        """Time a file in a process of its own."""
        step, sink, began = step_id("speed", file.name), self.session.sink, time.monotonic()
        sink(Started(step, title, (1 + bool(n_prompt)) * repetitions, "runs"))

        def on_event(event: Event) -> None:
            if isinstance(event, Progress):
                sink(event)

        log = self.session.log(step.replace(" ", "-"))
        depth = self.request.depth
        job = SpeedJob(step, file.file, n_prompt, N_GEN, depth, repetitions, self.options, log)
        try:
            runs = self.meter.measure_speed(job, on_event)
        except RunnerError as error:
            sink(Finished(step, "failed", error.why, time.monotonic() - began))
            raise
        rates = [f"{describe_rate(TokenRate.of(runs.generation))} tokens/s"]
        rates += [f"prompt {describe_rate(TokenRate.of(runs.prompt))}"] if runs.prompt else []
        sink(Finished(step, "done", ", ".join(rates), time.monotonic() - began))
        return runs

    def _joined(self, rounds: Sequence[TimedRuns]) -> MeasuredSpeed:
        devices = self.session.engine.devices
        on_gpu = any(not buffer.device.startswith("CPU") for buffer in rounds[0].buffers)
        options = self.options
        placed = {
            "-ngl": options.n_gpu_layers,
            "-fa": options.flash_attn,
            "-sm": options.split_mode,
            "-ts": options.tensor_split,
        }
        words = [f"{name} {value}" for name, value in placed.items() if value]
        words += [f"-b {options.n_batch}", f"-ub {options.n_ubatch}"]
        return MeasuredSpeed(
            TokenRate.of([speed for each in rounds for speed in each.prompt]),
            TokenRate.of([speed for each in rounds for speed in each.generation]),
            rounds[0].buffers,
            SpeedSetting(
                processor=processor_name(),
                gpus=tuple(device.partition(" (")[0] for device in devices) if on_gpu else (),
                machine=machine_fingerprint(devices),
                engine=self.session.engine.identity(),
                threads=rounds[0].threads,
                n_prompt=N_PROMPT,
                n_gen=N_GEN,
                depth=self.request.depth,
                options=" ".join(words),
            ),
        )
