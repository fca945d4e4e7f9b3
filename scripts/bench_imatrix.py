"""``scripts/bench imatrix``: the embedded engine's worker against llama-imatrix, on the same model, text and threads.

Both are timed as whole processes, in turn and on every source type, the order reversed every round; ratios are of medians.
Memory is the peak resident set of the process itself. ``--busy 1`` measures beside another program that keeps a core busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import worker_command
from imatrix_runner.engines.jobs import ChunkRange, CollectJob, CollectOptions
from imatrix_runner.process import child_environment
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.tiny_models import sample_text, write_llama_gguf

PROGRAMS = ("llama-imatrix", "embedded")


@dataclass(frozen=True)
class Took:
    """One process: wall seconds, peak memory in bytes, and (ours) what it says it spent on watching."""

    seconds: float
    peak: int
    watching: float = 0.0


def run(argv: list[str], env: dict[str, str], cwd: Path) -> tuple[Took, str]:
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        child = subprocess.Popen(argv, cwd=cwd, env=env, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode()
    if child.returncode:
        raise SystemExit(f"{argv[0]} ended with {child.returncode}: {text[-500:]}")
    return Took(seconds, usage.ru_maxrss * 1024), text


def theirs(toolchain: Toolchain, model: Path, text: Path, folder: Path, chunks: int, threads: int, *, ppl: bool) -> Took:
    argv = [str(toolchain.tool("llama-imatrix")), "-m", str(model), "-f", str(text), "-o", str(folder / "theirs.gguf")]
    argv += ["--chunks", str(chunks), "-t", str(threads), "-fit", "off", *([] if ppl else ["--no-ppl"])]
    return run(argv, dict(os.environ), folder)[0]  # as a shell would start it


def ours(library: Path | None, model: Path, text: Path, folder: Path, chunks: int, threads: int, *, ppl: bool) -> Took:
    every = 12
    ranges = tuple(ChunkRange(first, min(every, chunks - first)) for first in range(0, chunks, every))
    job = CollectJob("bench", model, text, ranges, folder, CollectOptions(threads=threads, ppl=ppl), "bench", None)
    command = worker_command(job, library)
    took, said = run(list(command.argv), child_environment(command.env), command.cwd or folder)
    pieces = [answer for line in said.splitlines() if (answer := json.loads(line))["type"] == "collected"]
    return Took(took.seconds, took.peak, sum(piece["watching_seconds"] for piece in pieces))


def compare(
    toolchain: Toolchain, library: Path | None, models: dict[str, Path], text: Path, folder: Path, options: argparse.Namespace
) -> None:
    """``models``: the same weights as each source type."""
    for ppl in (False, True) if options.ppl else (False,):
        rounds: dict[tuple[str, str], list[Took]] = {(kind, who): [] for kind in models for who in PROGRAMS}
        for number in range(options.rounds):
            for kind, who in list(rounds) if number % 2 == 0 else reversed(list(rounds)):
                if who == "embedded":
                    took = ours(library, models[kind], text, folder, options.chunks, options.threads, ppl=ppl)
                else:
                    took = theirs(toolchain, models[kind], text, folder, options.chunks, options.threads, ppl=ppl)
                rounds[kind, who].append(took)
        medians = {key: statistics.median(took.seconds for took in values) for key, values in rounds.items()}
        peaks = {key: max(took.peak for took in values) for key, values in rounds.items()}
        for kind, model in models.items():
            watching = statistics.median(took.watching / took.seconds for took in rounds[kind, "embedded"])
            figures = "   ".join(f"{who} {medians[kind, who]:6.2f} s {peaks[kind, who] / 1e6:5.0f} MB" for who in PROGRAMS)
            ratios = [values[kind, "embedded"] / values[kind, "llama-imatrix"] for values in (medians, peaks)]
            print(f"{model.name:20} {'--ppl' if ppl else '--no-ppl':9} {figures}   ", end="")
            print(f"time {ratios[0]:.3f}  memory {ratios[1]:.2f}  watching {100 * watching:.1f} %", flush=True)
        if {"f16", "bf16"} <= models.keys():
            ratio = medians["bf16", "embedded"] / medians["f16", "embedded"]
            print(f"BF16 instead of F16 source: {ratio:.2f} of the time", flush=True)


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many other programs, each keeping a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def write(model: Path, vocab: int, kind: str) -> None:
    """Random weights, 1024 wide, 8 layers: 101 M parameters and the vocabulary's."""
    dtype: Any = kind
    write_llama_gguf(model, hidden=1024, layers=8, ff=3072, vocab=vocab, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vocab", type=int, nargs="*", default=[32000, 131072])
    parser.add_argument("--types", nargs="*", default=["f16", "bf16"])
    parser.add_argument("--busy", type=int, default=0, help="with so many busy processes beside")
    parser.add_argument("--ppl", action="store_true", help="also with perplexity")
    options = parser.parse_args()
    toolchain = require(locate(None, env=os.environ, cache=cache_dir()))
    bindings = find(os.environ, cache_dir())
    print(f"{toolchain.identity()}; {bindings.identity()}; {options.chunks} chunks, {options.threads} threads, ", end="")
    print(f"{options.busy} busy processes beside, medians of {options.rounds}")
    with busy(options.busy), tempfile.TemporaryDirectory(prefix="imatrix-runner-bench-") as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text(sample_text(options.chunks * 4000), encoding="utf-8")
        for vocab in options.vocab:
            models = {kind: folder / f"{vocab // 1000}k-{kind}.gguf" for kind in options.types}
            for kind, model in models.items():
                # In a process of its own: a child's peak memory counts from the process that started it.
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    pool.submit(write, model, vocab, kind).result()
            compare(toolchain, bindings.library, models, text, folder, options)
            for model in models.values():
                model.unlink()


if __name__ == "__main__":
    main()
