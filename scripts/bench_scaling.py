"""``scripts/bench scaling``: at how many threads Python bounds the single pass, by set of levels.

Threads of a pass are threads of one Python process. Kernels, files and checksums work side by side; of Python one thread at a
time executes. So a pass cannot be faster than its slabs go through Python one by one. On one thread, medians of rounds:

* *slab*: processor time of a slab of 2^18 numbers with everything that is made of it;
* *Python*: the same where no kernel computes (each call goes to a C function that returns at once) and a slab is a single row,
  so that files and checksums take next to nothing. Time in the system is left out: other threads run meanwhile;
* *threads*: their ratio, if handing Python's lock from thread to thread took no time. From there on, further threads bring
  nothing. A disk may be the bound before: the last column is how fast a 16-bit model is read then.

With ``--crowd`` threads really stand in each other's way: kernels sleep as long as they would compute, so that any number of
threads fits on a small machine, and what comes out is the number of threads that are at work on average. It is too low where
the machine is busy, or its few processors are with Python and the system alone.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from imatrix_runner.cli.main import cli
from imatrix_runner.engines.embedded.engine import EmbeddedEngine, worker_command
from imatrix_runner.engines.jobs import PassJob
from imatrix_runner.engines.levels import PRESETS
from imatrix_runner.engines.worker.quantize import pass_job
from imatrix_runner.engines.worker.quantize.ggml_rows import Kernels
from imatrix_runner.engines.worker.quantize.pass_setting import PassSetting
from imatrix_runner.engines.worker.quantize.slabs import SLAB
from imatrix_runner.models.gguf_file import read_header
from support.tiny_models import write_llama_gguf

SETS = ("Q8_0", "Q4_0", "Q4_K_M", "IQ4_XS", "IQ2_XXS", "Q4_K_M,Q5_K_M,Q6_K,Q8_0", "k-quants", "bartowski")
WIDTH = 1024
PUBLISHER = 192
"""Threads of the machines that publishers have."""


class _Captured(Exception):
    """Carries the job out of a command that would have run it."""

    def __init__(self, job: PassJob) -> None:
        super().__init__()
        self.job = job


@dataclass(frozen=True)
class Share:
    """Seconds of a slab, and of Python's part in it."""

    levels: str
    slab: float
    python: float

    @property
    def threads(self) -> float:
        return self.slab / self.python

    @property
    def reading(self) -> float:
        """Bytes of a 16-bit model that so many threads read in a second."""
        return 2 * SLAB / self.python


class _Always(dict[int, Any]):
    """Has one value for every key."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def get(self, _key: int, _default: Any = None) -> Any:
        return self._value


def command(*words: str | Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main([str(word) for word in words], prog_name="imatrix-runner", standalone_mode=False)


def captured(model: Path, imatrix: Path, levels: str, work: Path) -> PassJob:
    """The job of the pass that makes ``levels`` (names, or a preset), for one thread."""

    def capture(engine: EmbeddedEngine, job: PassJob, _sink: Any) -> Any:
        os.environ.update(worker_command(job, engine.bindings.library).env)  # where the libraries are
        raise _Captured(replace(job, native=engine._native(), threads=1))

    original, EmbeddedEngine.one_pass = EmbeddedEngine.one_pass, capture  # type: ignore[assignment,method-assign]
    how = ("--preset", levels) if levels in PRESETS else ("--levels", levels)
    try:
        command("quantize", model, "--imatrix", imatrix, *how, "--work-dir", work, "-q")
    except _Captured as found:
        return found.job
    finally:
        EmbeddedEngine.one_pass = original  # type: ignore[method-assign]
    raise SystemExit(f"{levels}: no pass was planned")


def used(job: PassJob, *, system: bool) -> float:
    """Processor seconds of the threads of a pass in an empty folder; ``system``: with those in the system."""
    spent: list[float] = []
    served = PassSetting.serve

    def serve(self: PassSetting, *arguments: Any) -> None:
        before = os.times()
        served(self, *arguments)
        after = os.times()
        spent.append(after.user - before.user + (after.system - before.system if system else 0.0))

    for level in job.levels:
        shutil.rmtree(level.job.out.parent, ignore_errors=True)
    PassSetting.serve = serve  # type: ignore[method-assign]
    try:
        pass_job.single_pass(job, lambda _reply: None)
    finally:
        PassSetting.serve = served  # type: ignore[method-assign]
    return sum(spent)


@contextlib.contextmanager
def nothing_computed(sleep: float = 0.0) -> Iterator[None]:
    """Let every kernel be a C function that returns at once (with a number that is true), and slabs be taken as by one of
    many threads. ``sleep``: seconds that a kernel which quantises sleeps."""
    instant, nap, microseconds = ctypes.CDLL(None).getpid, ctypes.CDLL(None).usleep, round(1e6 * sleep)
    instant.restype = ctypes.c_int
    made, replaced = Kernels.__init__, Kernels.replace
    quantise = (lambda *_: nap(microseconds)) if sleep else instant

    def make(self: Any, library: Any) -> None:
        made(self, library)
        self._quantize, self._validate = quantise, instant
        self._wide = _Always(instant)

    def install(self: Any, kind: Any, _function: Any, *, weighted: bool) -> None:
        replaced(self, kind, quantise, weighted=weighted)

    at_once = pass_job.slabs_at_once
    Kernels.__init__, Kernels.replace = make, install  # type: ignore[method-assign,assignment]
    pass_job.slabs_at_once = lambda _threads: at_once(PUBLISHER)
    try:
        yield
    finally:
        Kernels.__init__, Kernels.replace = made, replaced  # type: ignore[method-assign]
        pass_job.slabs_at_once = at_once


def measure(levels: str, job: PassJob, rounds: int) -> Share:
    tensors = read_header(job.sources[0]).tensors
    n_elements, n_rows = (
        sum(sizes) for sizes in zip(*((each.n_elements, each.n_elements // each.shape[0]) for each in tensors), strict=True)
    )
    rows = replace(job, buffer_bytes=12 * WIDTH)
    used(job, system=True)  # files are read for the first time, kernels are proven
    slab = statistics.median(used(job, system=True) for _ in range(rounds)) * SLAB / n_elements
    with nothing_computed():
        python = statistics.median(used(rows, system=False) for _ in range(rounds)) / n_rows
    return Share(levels, slab, python)


def crowd(job: PassJob, slab: float, threads: int) -> float:
    """How many of ``threads`` threads are at work on average, where a slab takes ``slab`` seconds."""
    tensors = [each for each in read_header(job.sources[0]).tensors if len(each.shape) > 1]
    n_rows = sum(each.n_elements // each.shape[0] for each in tensors)
    wanted = {(target.original, target.type) for level in job.levels for target in level.tensors}
    pairs = sum(1 for name, kind in wanted for each in tensors if each.name == name and kind.lower() != "bf16")
    rows = replace(job, threads=threads, buffer_bytes=12 * WIDTH * threads)
    seconds: list[float] = []
    served = PassSetting.serve

    def serve(self: PassSetting, *arguments: Any) -> None:
        began = time.monotonic()
        served(self, *arguments)
        seconds.append(time.monotonic() - began)

    PassSetting.serve = serve  # type: ignore[method-assign]
    try:
        with nothing_computed(slab * len(tensors) / pairs):
            used(rows, system=False)
    finally:
        PassSetting.serve = served  # type: ignore[method-assign]
    return n_rows * slab / seconds[0]


def show(shares: Sequence[Share]) -> None:
    print(f"{'levels':26} {'slab':>10} {'Python':>10} {'threads':>8}  model read then")
    for share in shares:
        figures = f"{1e3 * share.slab:7.2f} ms {1e6 * share.python:7.1f} µs {share.threads:8.0f}"
        print(f"{share.levels:26} {figures} {share.reading / 1e9:7.1f} GB/s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=SETS, help="levels with commas, or presets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--crowd", type=int, nargs="*", default=[], metavar="N", help="threads that really run, with kernels that sleep"
    )
    options = parser.parse_args()
    held, _never = os.pipe()
    os.dup2(held, 0)  # a worker takes the end of its stdin for a request to stop
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, imatrix = folder / "bench-BF16.gguf", folder / "imatrix.gguf"
        write_llama_gguf(model, hidden=WIDTH, layers=2, ff=4 * WIDTH, vocab=2048, dtype="bf16")
        command("imatrix", "generate", model, "--chunks", "4", "--work-dir", folder / "imatrix", "-o", imatrix, "-q")
        jobs = [captured(model, imatrix, levels, folder / f"work-{number}") for number, levels in enumerate(options.sets)]
        shares = [measure(levels, job, options.rounds) for levels, job in zip(options.sets, jobs, strict=True)]
        show(shares)
        for share, job in zip(shares, jobs, strict=True) if options.crowd else ():
            found = [(threads, crowd(job, share.slab, threads)) for threads in options.crowd]
            print(f"{share.levels}: " + ", ".join(f"of {threads} threads {at_work:.0f} at work" for threads, at_work in found))
    slow = [share.levels for share in shares if share.threads < PUBLISHER]
    print(f"\nBelow {PUBLISHER} threads: {', '.join(slow) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
