"""``evaluate --speed`` against llama-bench of the same build, by turns; runs inside the checkout's ``.venv``.

llama-bench is compiled from the source of the toolchain's version and linked against the toolchain's own libraries, so that
both compute with the same code. Rounds alternate: what else the machine does then slows both alike. The ratio of each round's
pair is taken, and its geometric mean with the standard error over rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from bench_sources import source

from imatrix_runner.context.engine_choice import EngineNeeds, Machine, choose
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.engines.speed_jobs import SpeedJob
from imatrix_runner.events import ignore
from imatrix_runner.process import Runner
from imatrix_runner.signals import Stop
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.source import default_version, fetch_sdist, unpack_source
from imatrix_runner.toolchain.store import Store, cache_dir


def build_llama_bench(folder: Path) -> Path:
    """Compile llama-bench against the toolchain's libraries; half a minute."""
    libraries = require(locate(None, env=os.environ, cache=cache_dir())).directory
    store, runner = Store(cache_dir()), Runner(Stop())
    found = fetch_sdist(default_version(), store, runner, ignore)
    unpack_source(found, store, runner)
    tree, out = found.tree, folder / "llama-bench"
    headers = [f"-I{tree / name}" for name in ("include", "ggml/include", "common", "vendor", "src")]
    names = ("libllama-common.so.0", "libllama.so", "libggml.so", "libggml-base.so", "libggml-cpu.so")
    files = sorted((tree / "tools" / "llama-bench").glob("*.cpp"))
    command = ["c++", "-std=c++17", "-O2", *headers, *map(str, files), "-o", str(out), f"-Wl,-rpath,{libraries}", "-pthread"]
    subprocess.run([*command, *(str(libraries / name) for name in names)], check=True)
    return out


def theirs(program: Path, model: Path, threads: int, depth: int) -> tuple[float, float]:
    words = ["-m", str(model), "-t", str(threads), "-d", str(depth), "-r", "1", "-o", "json"]
    rows = json.loads(subprocess.run([program, *words], check=True, capture_output=True).stdout)
    prompt, generation = (next(row["avg_ts"] for row in rows if bool(row["n_gen"]) is generated) for generated in (False, True))
    return prompt, generation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", type=Path, help="GGUF files (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    choice = choose("embedded", EngineNeeds((), (), ""), Machine(None))
    with tempfile.TemporaryDirectory() as name, choice.opened(Runner(Stop()), None, ignore) as engine:
        program = build_llama_bench(Path(name))
        assert engine.speed_meter is not None
        print(f"{engine.identity()}; {options.rounds} rounds, {options.threads} threads, depth {options.depth}")
        for model in options.models or [source("demo")]:
            compute = CollectOptions(threads=options.threads)
            job = SpeedJob("speed", model.absolute(), 512, 128, options.depth, 1, compute, None)
            pairs = []
            for number in range(options.rounds):
                if number % 2:
                    other = theirs(program, model, options.threads, options.depth)
                    mine = engine.speed_meter.measure_speed(job, ignore)
                else:
                    mine = engine.speed_meter.measure_speed(job, ignore)
                    other = theirs(program, model, options.threads, options.depth)
                pairs.append(((mine.prompt[0], other[0]), (mine.generation[0], other[1])))
            print(f"{model.name}, {model.stat().st_size / 1e6:.0f} MB")
            for at, test in enumerate(("pp512", "tg128")):
                ratios = [math.log(pair[at][0] / pair[at][1]) for pair in pairs]
                ours, bench = (statistics.fmean(pair[at][side] for pair in pairs) for side in (0, 1))
                error = statistics.stdev(ratios) / math.sqrt(len(ratios))
                ratio = math.exp(statistics.fmean(ratios))
                print(f"  {test}  ours {ours:9.2f} t/s  llama-bench {bench:9.2f} t/s  ratio {ratio:.3f} ± {ratio * error:.3f}")


if __name__ == "__main__":
    main()
