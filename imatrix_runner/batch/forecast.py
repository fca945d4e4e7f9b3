"""How long the rest of a batch will take, by how fast its stages were on earlier models. Pure, but for its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from imatrix_runner.batch.batch_journal import StageDone
from imatrix_runner.batch.schedule import LANES, Lane, Stage
from imatrix_runner.errors import RunnerError
from imatrix_runner.files import read_json, write_json

_LEAST_SECONDS = 0.001
_FILE = ".batch-speeds.json"
_MOST_BYTES = 1 << 16


class StageSpeed(msgspec.Struct, frozen=True):
    """Bytes that a stage worked on, and the seconds that took."""

    n_bytes: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Bytes per second; None before anything was measured."""
        return self.n_bytes / max(self.seconds, _LEAST_SECONDS) if self.n_bytes else None


@dataclass(frozen=True)
class Speeds:
    """The measured speed of every stage."""

    stages: Mapping[Stage, StageSpeed] = field(default_factory=dict)

    def seconds(self, stage: Stage, n_bytes: int) -> float | None:
        """How long a stage will take; None for a speed that is not known."""
        if not n_bytes:
            return 0.0
        rate = self.stages.get(stage, StageSpeed()).rate
        return n_bytes / rate if rate else None

    def with_stage(self, done: StageDone) -> Speeds:
        """The speeds with one more stage."""
        if not done.n_bytes:
            return self
        before = self.stages.get(done.stage, StageSpeed())
        now = StageSpeed(before.n_bytes + done.n_bytes, before.seconds + done.seconds)
        return Speeds({**self.stages, done.stage: now})


def speeds_of(stages: Iterable[StageDone], before: Speeds | None = None) -> Speeds:
    """The speeds of finished stages, added to those of ``before``."""
    speeds = before or Speeds()
    for done in stages:
        speeds = speeds.with_stage(done)
    return speeds


def read_speeds(work_dir: Path) -> Speeds:
    """The speeds that earlier batches measured in a work directory; none if the file cannot be read."""
    with suppress(RunnerError):
        if (work_dir / _FILE).exists():
            return Speeds(read_json(work_dir / _FILE, dict[Stage, StageSpeed], limit=_MOST_BYTES))
    return Speeds()


def write_speeds(work_dir: Path, speeds: Speeds) -> None:
    """Keep the speeds for the next batch. If they cannot be written, it begins without."""
    with suppress(RunnerError):
        write_json(work_dir / _FILE, speeds.stages)


@dataclass(frozen=True)
class RemainingWork:
    """Bytes that each stage of a model still has to work on."""

    stages: Mapping[Stage, int]

    def seconds(self, speeds: Speeds) -> float | None:
        """How long that takes, one stage after another; None if a speed is not known."""
        times = [speeds.seconds(stage, n_bytes) for stage, n_bytes in self.stages.items()]
        known = [each for each in times if each is not None]
        return sum(known) if len(known) == len(times) else None


def batch_seconds(models: Iterable[RemainingWork], speeds: Speeds, compute_lanes: int = 1) -> float | None:
    """How long all models take: as long as the busiest lane, since stages of different models overlap. ``compute_lanes``:
    models that are computed at a time."""
    lanes: dict[Lane, float] = {}
    longest = 0.0
    for model in models:
        alone = 0.0
        for stage, n_bytes in model.stages.items():
            seconds = speeds.seconds(stage, n_bytes)
            if seconds is None:
                return None
            lane = LANES[stage]
            lanes[lane] = lanes.get(lane, 0.0) + seconds / (compute_lanes if lane == "compute" else 1)
            alone += seconds
        longest = max(longest, alone)
    return max((*lanes.values(), longest), default=0.0)
