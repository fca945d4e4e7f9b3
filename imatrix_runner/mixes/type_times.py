"""How long this machine takes for a weight of each type when it generates a token: measured once, and kept in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import median

import msgspec

from imatrix_runner.context.context import Session
from imatrix_runner.engines.abilities import SpeedMeter
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.speed_jobs import SpeedJob, timing_words
from imatrix_runner.events import Finished, Progress, Started, ignore
from imatrix_runner.remembered import recall, remember
from imatrix_runner.scratch import scratch_folder
from imatrix_runner.toolchain.hardware import machine_fingerprint
from imatrix_runner.toolchain.speed_model import SpeedShape, write_speed_model

_FOLDER = "speeds"
_STEP = "types"
_TOKENS, _REPETITIONS = 16, 5
_GENERATED = 64


class TypeTimes(msgspec.Struct, frozen=True):
    """Seconds for each weight of a type in a matrix-vector product, as part of a whole graph; by ggml's name of the type."""

    key: str
    seconds: dict[str, float]


def compute_words(options: CollectOptions, session: Session) -> str:
    """What times depend on: the machine, the engine, and how it computes."""
    return " ".join((machine_fingerprint(session.engine.devices), session.engine.arithmetic(), timing_words(options)))


def type_times(
    kinds: Collection[str],
    options: CollectOptions,
    session: Session,
    meter: SpeedMeter,
    cache: Path,
    shape: SpeedShape | None = None,
) -> Mapping[str, float]:
    """Seconds per weight of each of these types; those that the cache does not know are measured, with a model of ``shape``."""
    shape = shape or SpeedShape()
    key = hashlib.sha256(f"{compute_words(options, session)} {shape}".encode("utf-8", "surrogateescape")).hexdigest()
    known = recall(cache / _FOLDER, key, TypeTimes)
    seconds = dict(known.seconds) if known is not None else {}
    todo = sorted({kind.upper() for kind in kinds} - seconds.keys())
    if todo:
        session.sink(Started(_STEP, f"timing {len(todo)} types on this machine", len(todo), "types"))
        with scratch_folder() as folder:
            for number, kind in enumerate(todo):
                seconds[kind] = _time(kind, options, session, meter, folder, shape)
                session.sink(Progress(_STEP, number + 1, len(todo), kind))
        remember(cache / _FOLDER, TypeTimes(key, seconds))
        session.sink(Finished(_STEP, "done", f"{len(todo)} types"))
    return {kind: seconds[kind.upper()] for kind in kinds}


def _time(kind: str, options: CollectOptions, session: Session, meter: SpeedMeter, folder: Path, shape: SpeedShape) -> float:
    model = folder / f"{kind}.gguf"
    write_speed_model(model, kind, shape)
    job = SpeedJob(_STEP, model, 0, _TOKENS, 0, _REPETITIONS, options, session.log(_STEP))
    speeds = meter.measure_speed(job, ignore).generation
    model.unlink()
    return 1 / (median(speeds) * shape.n_weights)


def seconds_per_token(model: Path, options: CollectOptions, session: Session, meter: SpeedMeter) -> float:
    """How long a file takes to generate a token."""
    job = SpeedJob("speed", model, 0, _GENERATED, 0, _REPETITIONS, options, session.log("speed"))
    return 1 / median(meter.measure_speed(job, ignore).generation)
