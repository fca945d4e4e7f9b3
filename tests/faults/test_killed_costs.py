"""Workers that measure what rounding costs, killed at many moments: what they leave is continued to the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from imatrix_runner.engines.cost_jobs import RoundedTensor, RoundingErrorsJob, Trial, TrialsJob
from imatrix_runner.engines.embedded.bindings import worker_command
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.events import ignore
from imatrix_runner.process import child_environment
from imatrix_runner.toolchain.probe import Toolchain
from support.costs import errors_job, matrices_of, trials_job
from support.passes import engine_of, write_imatrix
from support.tiny_models import write_llama_gguf

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

KILLS = 12


@pytest.fixture(scope="module")
def engine(toolchain: Toolchain) -> EmbeddedEngine:
    return engine_of(toolchain)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough for a job to take a second after its start."""
    return write_llama_gguf(tmp_path_factory.mktemp("model") / "model.gguf", hidden=512, ff=1024, vocab=4096, layers=3)


@pytest.fixture(params=["errors", "trials"])
def job(request: pytest.FixtureRequest, model: Path, tiny_text: Path, tmp_path: Path) -> RoundingErrorsJob | TrialsJob:
    imatrix = write_imatrix(tmp_path / "imatrix.gguf", model)
    names = matrices_of(model)
    if request.param == "errors":
        types = ("q4_K", "q6_K", "q4_0", "q8_0")
        tensors = [RoundedTensor(name, kind) for name in names for kind in types]
        return errors_job([model], tensors, imatrix, tmp_path / "errors", threads=1)
    trials = [Trial(name, (RoundedTensor(name, "q4_0"),)) for name in names[:16]]
    return trials_job(model, tiny_text, trials, imatrix, tmp_path / "trials")


def measure(engine: EmbeddedEngine, job: RoundingErrorsJob | TrialsJob) -> bytes:
    if isinstance(job, TrialsJob):
        engine.trials(job, ignore)
    else:
        engine.rounding_errors(job, ignore)
    return job.out.read_bytes()


def kill_once(engine: EmbeddedEngine, job: RoundingErrorsJob | TrialsJob, reached: Callable[[], bool]) -> bool:
    """Let a worker work until ``reached`` or its end; whether it was killed."""
    command = worker_command(job, engine.bindings.library)
    child = subprocess.Popen(
        list(command.argv),
        env=child_environment(command.env),
        cwd=command.cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < deadline and not reached():
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode == -signal.SIGKILL


def content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def records_in(path: Path) -> int:
    return max(0, content(path).count(b"\n") - 1)


@dataclass
class Moment:
    """``wait`` seconds after a file has ``least`` records."""

    path: Path
    least: int
    wait: float
    begun: float | None = None

    def reached(self) -> bool:
        if self.begun is None and records_in(self.path) >= self.least:
            self.begun = time.monotonic()
        return self.begun is not None and time.monotonic() - self.begun >= self.wait


def test_killed_after_some_records(engine: EmbeddedEngine, job: RoundingErrorsJob | TrialsJob, tmp_path: Path) -> None:
    """Each time some records later, and a random moment later still: nothing is lost, and nothing is there twice. Whenever a
    worker gets through, the next begins from nothing."""
    whole = measure(engine, replace(job, out=tmp_path / "whole"))
    total, chooser = whole.count(b"\n") - 1, random.Random(15)
    kills, left = 0, [0]
    while kills < KILLS:
        least, wait = left[-1] + chooser.randint(0, 2 * total // KILLS), chooser.choice((0.0, 0.01, 0.1)) * chooser.random()
        killed = kill_once(engine, job, Moment(job.out, least, wait).reached)
        kills += killed
        left.append(records_in(job.out))
        assert left[-1] >= left[-2]
        lines = content(job.out).splitlines(keepends=True)
        assert whole.startswith(b"".join(lines[: left[-1] + 1]) if left[-1] else b"")
        if not killed:
            assert content(job.out) == whole
            job.out.unlink()
            left.append(0)
    assert measure(engine, job) == whole
    assert not list(tmp_path.glob(".*reference*"))
    assert sum(0 < count < total for count in left) > KILLS // 4


def test_killed_at_moments_of_the_clock(engine: EmbeddedEngine, job: RoundingErrorsJob | TrialsJob, tmp_path: Path) -> None:
    """Also while the library is loaded, the reference is computed, or the file is begun."""
    began = time.monotonic()
    whole = measure(engine, replace(job, out=tmp_path / "whole"))
    seconds, chooser = time.monotonic() - began, random.Random(16)
    for _ in range(KILLS):
        end = time.monotonic() + chooser.uniform(0.1, 0.9) * seconds
        kill_once(engine, job, lambda end=end: time.monotonic() >= end)  # type: ignore[misc]
    assert measure(engine, job) == whole
