"""``scripts/bench covariances``: processor time per chunk of covariances and of an imatrix, by the same worker on one thread.

The time of a few chunks is subtracted from that of many, so that starting and loading do not count. Of a mixture the few tokens
that each expert sees in a micro-batch cost most.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.jobs import ChunkRange, CollectJob, CollectOptions
from imatrix_runner.events import ignore
from imatrix_runner.imatrix.covariances import expected_inputs, plan_covariances
from imatrix_runner.models.model import open_gguf
from imatrix_runner.process import Runner
from imatrix_runner.resources import CALIBRATION_TEXT, DEMO_MODEL
from imatrix_runner.resources import resource as shipped
from imatrix_runner.toolchain.store import cache_dir
from support.covariances import PLENTY, covariance_job
from support.tiny_models import write_llama_gguf

FEW = 4


def used() -> float:
    """Processor seconds of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def seconds(work: Callable[[int], None], chunks: int) -> float:
    """Processor seconds that ``work`` takes for a chunk."""
    work(FEW)  # compiles the kernels
    before = used()
    work(FEW)
    between = used()
    work(chunks)
    return (used() - between - (between - before)) / (chunks - FEW)


def compare(name: str, model: Path, chunks: int, folder: Path) -> None:
    engine = EmbeddedEngine(find(os.environ, cache_dir()), Runner(), cache_dir())
    options, text = CollectOptions(threads=1, ppl=False), shipped(CALIBRATION_TEXT)

    def imatrix(count: int) -> None:
        job = CollectJob("imatrix", model, text, (ChunkRange(0, count),), folder, options, "bench", None)
        engine.collect(job, ignore, lambda _: True)

    def covariances(count: int) -> None:
        job = covariance_job(model, text, folder / "covariances", options)
        done = replace(job, ranges=(ChunkRange(0, count),), fingerprint=os.urandom(8).hex(), memory_bytes=PLENTY)
        engine.collect_covariances(done, ignore)

    one, other = seconds(imatrix, chunks), seconds(covariances, chunks)
    opened = open_gguf(model, allow_requantize=True)
    inputs = expected_inputs(opened, covariance_job(model, text, folder, options).weights)
    plan = plan_covariances(opened, inputs, (ChunkRange(0, chunks),), options.n_ctx, PLENTY)
    print(f"{name:8} {one:8.3f} s {other:8.3f} s {other / one:6.2f}   planned {plan.effort:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=40)
    chunks = parser.parse_args().chunks
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("model     imatrix/chunk covariances/chunk ratio")
        compare("demo", shipped(DEMO_MODEL), chunks, folder)
        wide = write_llama_gguf(folder / "wide.gguf", hidden=1024, ff=3584, layers=3, vocab=2048)
        compare("wide", wide, max(FEW + 4, chunks // 4), folder)
        mixture = write_llama_gguf(folder / "mixture.gguf", hidden=512, ff=512, layers=2, vocab=2048, experts=32)
        compare("mixture", mixture, chunks, folder)


if __name__ == "__main__":
    main()
