"""The measurement of ``scripts/bench``; runs inside the checkout's ``.venv``."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from imatrix_runner.engines.levels import DEFAULT_LEVELS as LEVELS
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.tiny_models import sample_text, write_llama_gguf


def timed(commands: list[list[str]], cwd: Path) -> float:
    """Seconds that the commands take, one after the other."""
    began = time.monotonic()
    for command in commands:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True)
    return time.monotonic() - began


def bare(toolchain: Toolchain, model: Path, text: Path, folder: Path, chunks: int, threads: int) -> float:
    """llama-imatrix once, then llama-quantize per level: what people type today."""
    imatrix = [str(toolchain.tool("llama-imatrix")), "-m", str(model), "-f", str(text), "-o", "imatrix.gguf"]
    imatrix += ["--chunks", str(chunks), "-t", str(threads), "-fit", "off"]
    quantize = [str(toolchain.tool("llama-quantize")), "--imatrix", "imatrix.gguf", str(model)]
    return timed([imatrix, *([*quantize, f"{level}.gguf", level, str(threads)] for level in LEVELS)], folder)


def ours(model: Path, text: Path, folder: Path, chunks: int, threads: int, jobs: str) -> float:
    """The same through the command line, which also plans, verifies, hashes and journals."""
    command = [sys.executable, "-m", "imatrix_runner", "run", str(model), "-f", str(text), "--work-dir", str(folder)]
    command += ["--chunks", str(chunks), "-t", str(threads), "--jobs", jobs, "--levels", ",".join(LEVELS), "-q"]
    return timed([command], folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    toolchain = require(locate(None, env=os.environ, cache=cache_dir()))
    with tempfile.TemporaryDirectory(prefix="imatrix-runner-bench-") as name:
        folder = Path(name)
        model = write_llama_gguf(folder / "bench-BF16.gguf", hidden=1024, layers=8, ff=3072, vocab=1024)
        text = folder / "text.txt"
        text.write_text(sample_text(options.chunks * 4000), encoding="utf-8")
        print(
            f"{toolchain.identity()}, {model.stat().st_size / 1e6:.0f} MB, {options.chunks} chunks, {len(LEVELS)} levels, ",
            end="",
        )
        print(f"{options.threads} threads, medians of {options.rounds}")
        seconds: dict[str, list[float]] = {"bare": [], "--jobs 1": [], "--jobs auto": []}
        for number in range(options.rounds):
            for kind in list(seconds) if number % 2 == 0 else reversed(list(seconds)):
                place = folder / "out"
                place.mkdir()
                if kind == "bare":
                    took = bare(toolchain, model, text, place, options.chunks, options.threads)
                else:
                    took = ours(model, text, place, options.chunks, options.threads, kind.removeprefix("--jobs "))
                seconds[kind].append(took)
                shutil.rmtree(place)
                print(f"round {number + 1}: {kind:12} {took:7.2f} s", flush=True)
        medians = {kind: statistics.median(values) for kind, values in seconds.items()}
        for kind, value in medians.items():
            print(f"{kind:12} {value:7.2f} s   ratio {value / medians['bare']:.3f}")


if __name__ == "__main__":
    main()
