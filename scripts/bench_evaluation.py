"""``scripts/bench evaluation``: the embedded engine's worker against llama-perplexity: the reference, and a level against it.

Both are timed as whole processes, in turn, the order reversed every round, on the same model, text, base file and threads;
ratios are of medians. "Pass" is without loading the model: llama-perplexity's log says when it begins, the worker tells its
own. Memory is the peak resident set of the process itself (``ru_maxrss``): what is mapped of the model and of the base counts,
as far as it was looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bench_imatrix import write

from imatrix_runner.engines.embedded.bindings import find, worker_command
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions, QuantizeJob, QuantizeOptions
from imatrix_runner.engines.llama_cpp.flags import measure_command, quantize_command, reference_command
from imatrix_runner.engines.measures import MeasureJob, ReferenceJob
from imatrix_runner.process import Command, Runner, child_environment
from imatrix_runner.resources import DEMO_MODEL, HELD_OUT_TEXT, resource
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.probe import Toolchain
from imatrix_runner.toolchain.store import cache_dir
from support.tiny_models import sample_text

TIME_GOAL, MEMORY_GOAL = 1.1, 1.0
PROGRAMS = ("llama-perplexity", "embedded")
_BEGINS = re.compile(r"^(\d+)\.(\d+)\.(\d+)\.(\d+) I (?:perplexity: tokenizing|kl_divergence: computing)", re.MULTILINE)


@dataclass(frozen=True)
class Took:
    """One process: seconds from start to end, of these without loading, and of processors; peak memory in bytes."""

    seconds: float
    computing: float
    cpu: float
    peak: int


@dataclass(frozen=True)
class Case:
    """A source, a level of it, and the text they are measured with."""

    name: str
    source: Path
    level: Path
    text: Path
    chunks: int


def run(command: Command, folder: Path, begun: Callable[[str, float], float]) -> Took:
    """``begun`` tells from what it said, and the seconds it took, how long it computed."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        env = child_environment(command.env)
        child = subprocess.Popen(
            command.argv, cwd=command.cwd or folder, env=env, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        said = out.read().decode()
    if child.returncode:
        raise SystemExit(f"{command.argv[0]} ended with {child.returncode}: {said[-500:]}")
    return Took(seconds, begun(said, seconds), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def theirs(said: str, seconds: float) -> float:
    begins = _BEGINS.search(said)
    if begins is None:
        raise SystemExit(f"llama-perplexity does not say when it begins: {said[-500:]}")
    minutes, whole, milli, micro = (int(part) for part in begins.groups())
    return seconds - (60 * minutes + whole + milli / 1e3 + micro / 1e6)


def ours(said: str, _seconds: float) -> float:
    told = next(json.loads(line) for line in said.splitlines() if line.startswith('{"type":"judged"'))
    return float(told["seconds"])


def once(case: Case, what: str, who: str, tools: Toolchain, library: Path | None, folder: Path, threads: int) -> Took:
    """Each has a base of its own; a level is compared with llama-perplexity's by both."""
    options = CollectOptions(threads=threads)
    base, mine, out = folder / "theirs.logits", folder / "ours.logits", folder / "scored"
    for old in (mine, out):
        old.unlink(missing_ok=True)
    if who == "embedded":
        refer = ReferenceJob("bench", case.source, case.text, ChunkRange(0, case.chunks), mine, options, "bench", None)
        judge = MeasureJob("bench", case.level, base, out, options, "bench", None)
        return run(worker_command(refer if what == "reference" else judge, library), folder, ours)
    if what == "reference":
        job = ReferenceJob("bench", case.source, case.text, ChunkRange(0, case.chunks), base, options, "bench", None)
        return run(reference_command(job, base, tools), folder, theirs)
    return run(measure_command(MeasureJob("bench", case.level, base, out, options, "bench", None), base, tools), folder, theirs)


def compare(case: Case, tools: Toolchain, library: Path | None, folder: Path, options: argparse.Namespace) -> None:
    for what in ("reference", "level"):
        rounds: dict[str, list[Took]] = {who: [] for who in PROGRAMS}
        for number in range(options.rounds):
            for who in PROGRAMS if number % 2 == 0 else PROGRAMS[::-1]:
                rounds[who].append(once(case, what, who, tools, library, folder, options.threads))
        show(f"{case.name:12} {what:9}", rounds)


def show(title: str, rounds: dict[str, list[Took]]) -> None:
    """One line: what each took, and ours as shares of theirs."""
    table = {
        who: [statistics.median(getattr(took, name) for took in rounds[who]) for name in ("seconds", "computing", "cpu")]
        + [max(took.peak for took in rounds[who]) / 1e6]
        for who in PROGRAMS
    }
    shares = [mine / their for their, mine in zip(*(table[who] for who in PROGRAMS), strict=True)]
    missed = "" if shares[1] <= TIME_GOAL and shares[3] <= MEMORY_GOAL else "   goal missed"
    for who in PROGRAMS:
        print("{:26}{:17}{:8.2f} s  pass {:7.2f} s  cpu {:7.2f} s  {:6.0f} MB".format(title, who, *table[who]))
    print(
        "{:26}{:17}{:8.3f}    pass {:7.3f}    cpu {:7.3f}    {:6.2f}".format(title, "ours / theirs", *shares) + missed,
        flush=True,
    )


def cases(folder: Path, tools: Toolchain, options: argparse.Namespace) -> list[Case]:
    """The demo model, and random weights with vocabularies as large as models have."""
    text = folder / "text.txt"
    text.write_text(sample_text(options.chunks * 4000), encoding="utf-8")
    sources = [("demo", resource(DEMO_MODEL), resource(HELD_OUT_TEXT), 48)]
    for vocab in options.vocab:
        model = folder / f"{vocab // 1000}k.gguf"
        # In a process of its own: a child's peak memory counts from the process that started it.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(write, model, vocab, "f16").result()
        sources.append((f"{vocab // 1000}k tokens", model, text, options.chunks))
    found = []
    for name, source, words, chunks in sources:
        level = folder / f"{source.stem}-{options.level}.gguf"
        job = QuantizeJob("bench", source, level, options.level, QuantizeOptions(), None, options.threads, None)
        Runner().run(quantize_command(job, tools))
        found.append(Case(name, source, level, words, chunks))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=8, help="of the models with random weights")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vocab", type=int, nargs="*", default=[32000, 131072])
    parser.add_argument("--level", default="Q4_K_M")
    options = parser.parse_args()
    tools = require(locate(None, env=os.environ, cache=cache_dir()))
    bindings = find(os.environ, cache_dir())
    print(f"{tools.identity()}; {bindings.identity()}; {options.level}, {options.threads} threads, medians of ", end="")
    print(f"{options.rounds}; load {os.getloadavg()[0]:.1f}")
    print(f"goal: a pass at most {TIME_GOAL} of llama-perplexity's time, memory at most {MEMORY_GOAL:g} of its")
    with tempfile.TemporaryDirectory(prefix="imatrix-runner-bench-") as name:
        folder = Path(name)
        for case in cases(folder, tools, options):
            compare(case, tools, bindings.library, folder, options)


if __name__ == "__main__":
    main()
