"""Workers that collect covariances, killed at many moments: what they leave is continued to the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from imatrix_runner.engines.covariance_jobs import CovarianceJob, triangle
from imatrix_runner.engines.embedded.bindings import worker_command
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.embedded.native_build import compile_kernels
from imatrix_runner.engines.jobs import ChunkRange, Native
from imatrix_runner.errors import NoSpaceError
from imatrix_runner.events import ignore
from imatrix_runner.process import child_environment
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.covariances import bytes_in, collected_set, covariance_job
from support.mounts import mounted
from support.passes import engine_of
from support.tiny_models import write_llama_gguf

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

KILLS = 10


@pytest.fixture(scope="module")
def engine(toolchain: Toolchain) -> EmbeddedEngine:
    return engine_of(toolchain)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("model") / "model.gguf", hidden=384, ff=768, layers=3)


@pytest.fixture
def job(engine: EmbeddedEngine, model: Path, tiny_text: Path, tmp_path: Path) -> CovarianceJob:
    """Three runs over the text; unfinished sums are saved after every batch."""
    native = compile_kernels(cache_dir(), engine.bindings.digest)
    assert isinstance(native, Native)
    job = covariance_job(model, tiny_text, tmp_path / "covariances")
    memory = 8 * (triangle(768) + 3 * triangle(384))
    return replace(job, ranges=(ChunkRange(0, 24),), memory_bytes=memory, save_seconds=0.0, native=native)


def kill_once(engine: EmbeddedEngine, job: CovarianceJob, reached: Callable[[], bool]) -> bool:
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


def changes_of(folder: Path) -> Callable[[], int]:
    """Counts how often a file in a folder appeared, was replaced or removed."""
    seen, count = set[tuple[str, int]](), 0

    def look() -> int:
        nonlocal seen, count
        now = set()
        for path in folder.iterdir() if folder.is_dir() else ():
            try:
                now.add((path.name, path.stat().st_ino))
            except FileNotFoundError:
                continue
        count += now != seen
        seen = now
        return count

    return look


def test_killed_after_changes_of_its_files(engine: EmbeddedEngine, job: CovarianceJob, tmp_path: Path) -> None:
    """While sums are saved, while files are written, between groups: nothing is lost that was finished."""
    collected_set(engine, replace(job, folder=tmp_path / "whole"))
    whole, chooser = bytes_in(tmp_path / "whole"), random.Random(15)
    left: list[int] = []
    for _ in range(KILLS):
        look, least = changes_of(job.folder), chooser.randint(2, 12)
        killed = kill_once(engine, job, lambda look=look, least=least: look() >= least)  # type: ignore[misc]
        files = bytes_in(job.folder) if job.folder.is_dir() else {}
        left.append(sum(name in whole and data == whole[name] for name, data in files.items()))
        assert all(data == whole[name] for name, data in files.items() if name in whole)
        if not killed:
            assert files == whole
            for path in job.folder.iterdir():
                path.unlink()
    collected_set(engine, job)
    assert bytes_in(job.folder) == whole
    assert sum(0 < count < len(whole) for count in left) >= 2


def test_a_full_disk_is_told_and_the_same_job_continues(engine: EmbeddedEngine, job: CovarianceJob, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    collected_set(engine, replace(job, folder=whole))
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=14m", "tmpfs") as disk:
        small = replace(job, folder=disk / "covariances", log=None)
        (disk / "other").write_bytes(bytes(8 << 20))
        with pytest.raises(NoSpaceError) as caught:
            engine.collect_covariances(small, ignore)
        assert caught.value.todo
        (disk / "other").unlink()
        collected_set(engine, replace(small, save_seconds=300.0))
        assert bytes_in(small.folder) == bytes_in(whole)
