"""``scripts/bench convergence``: how the demo model's levels depend on the text its matrix saw, and what stopping early costs.

Matrices of the first N chunks of a text, of N chunks scattered over it, and of what ``--until-converged TOL`` takes; levels
made with each; their KL divergence from the BF16 model on the files that model never saw.

``more`` is the difference to the whole text's matrix, ``s.e.`` that in standard errors. In such an error are the held-out text
(both files are measured on the same chunks, so from chunk to chunk) and the luck of rounding: what the divergence varies by
when the whole text's matrix is shaken by 1 % in every column, which is far less than the texts themselves leave open.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from command_line import run_command
from demo_corpus import read_corpus
from divergence import Divergence, divergence, save_logits
from llama_tools import BareTools

from imatrix_runner.imatrix.convergence import distance
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import Entry
from imatrix_runner.resources import CALIBRATION_TEXT, DEMO_MODEL, resource
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.store import cache_dir

LEVELS = ("IQ2_XXS", "Q2_K", "Q4_K_M")
N_BATCH = 2048
TOKENS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
TOLERANCES = (0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
SHAKEN, SHAKES = 0.01, 4
SHARES = range(1, 5)
"""Of fifty: 26 files of the standard library, then their docstrings, 449 chunks of 512 tokens."""


@dataclass(frozen=True)
class Text:
    path: Path
    n_ctx: int

    @property
    def batch(self) -> int:
        return N_BATCH // self.n_ctx


@dataclass(frozen=True)
class Made:
    """A matrix, how many chunks it saw, and what was estimated of its worst tensor and the median on the way."""

    label: str
    path: Path
    chunks: int
    worst: float | None = None
    median: float | None = None
    note: str = ""


class Bench:
    def __init__(self, tools: BareTools, folder: Path, workers: int) -> None:
        self._tools, self._folder, self._pool = tools, folder, ThreadPoolExecutor(workers)
        self._model = resource(DEMO_MODEL)
        self._base = folder / "base.kld"
        self._measured: dict[tuple[str, str], Divergence] = {}

    def keep_base(self, held_out: Path) -> None:
        save_logits(self._tools, self._model, held_out, self._base)

    def generate(self, text: Text, name: str, *options: str) -> tuple[Path, dict[str, Any]]:
        """The command line itself, in a folder of its own; the file and what the document says of how it was collected."""
        folder = self._folder / f"{text.path.stem}-{name}"
        out = folder / "imatrix.gguf"
        arguments = ["imatrix", "generate", str(self._model), "-f", str(text.path), "-c", str(text.n_ctx), "-o", str(out)]
        arguments += ["--work-dir", str(folder / "work"), "--no-ppl", "-t", "1", "--engine", "embedded", "--json", *options]
        folder.mkdir()
        ran = run_command(*arguments, cwd=folder, seconds=3600)
        if ran.code:
            raise SystemExit(ran.err)
        return out, ran.document["collected"]

    def prefixes(self, text: Text, name: str, label: str, *options: str) -> list[Made]:
        """Matrices of more and more chunks of one collection, which saves after every batch."""
        every = str(text.batch)
        out, facts = self.generate(text, name, "-ofreq", every, "--save-frequency", every, *options)
        curve = {point["chunks"]: point for point in facts["curve"]}
        made: list[Made] = []
        for chunks in [*(tokens // text.n_ctx for tokens in TOKENS), facts["chunks"]]:
            path = out if chunks == facts["chunks"] else out.with_name(f"{out.name}.at_{chunks}")
            if path.exists():
                point = curve.get(chunks, {})
                made.append(Made(label, path, chunks, point.get("worst"), point.get("median")))
        return made

    def converged(self, text: Text, tolerance: float, *options: str) -> Made:
        out, facts = self.generate(text, f"{tolerance:g}{''.join(options)}", "--until-converged", f"{tolerance:g}", *options)
        last = facts["curve"][-1]
        label = f"until {tolerance:g}{' '.join(['', *options])}"
        return Made(label, out, facts["chunks"], last["worst"], last["median"], facts["stopped"])

    def shaken(self, whole: Made) -> list[Made]:
        """The same matrix a few times, each column off by some 1 %."""
        matrix = read(whole.path).matrix
        made: list[Made] = []
        for seed in range(SHAKES):
            draw = np.random.default_rng(seed)
            entries = {name: matrix.entries[name] for name in matrix.entries}
            moved = {
                name: Entry(entry.sums * draw.normal(1, SHAKEN, entry.sums.shape), entry.counts)
                for name, entry in entries.items()
            }
            path = whole.path.with_name(f"shaken-{seed}.gguf")
            write_gguf(replace(matrix, entries=moved), path)
            made.append(Made(f"all, shaken by {SHAKEN:.0%}", path, whole.chunks))
        return made

    def luck(self, same: Sequence[Made], level: str) -> float:
        """The standard deviation of the divergence over matrices that are as good as each other."""
        return float(np.std([self.of(made, level).mean for made in same], ddof=1))

    def measure(self, made: Iterable[Made]) -> None:
        """The divergence of every level with every matrix; equal matrices are measured once."""
        jobs = {(digest(item.path), level): item.path for item in made for level in LEVELS}
        jobs = {job: path for job, path in jobs.items() if job not in self._measured}
        self._measured.update(zip(jobs, self._pool.map(self._divergence, jobs, jobs.values()), strict=True))

    def _divergence(self, job: tuple[str, str], matrix: Path) -> Divergence:
        digest, level = job
        out = self._tools.quantize(self._model, self._folder / f"{digest}-{level}.gguf", level, imatrix=matrix)
        measured = divergence(self._tools, out, self._base)
        out.unlink()
        return measured

    def of(self, made: Made, level: str) -> Divergence:
        return self._measured[digest(made.path), level]

    def both(self, *jobs: Any) -> list[Any]:
        return [future.result() for future in [self._pool.submit(*job) for job in jobs]]

    def table(self, rows: Sequence[Made], whole: Made, same: Sequence[Made]) -> None:
        scored = " ".join(f"{level + ' KLD':>19} {'more':>8} {'s.e.':>5}" for level in LEVELS)
        print(f"{'matrix':18} {'chunks':>6} {'worst':>6} {'median':>6} {'off by':>13}  {scored}")
        luck = {level: self.luck([whole, *same], level) for level in LEVELS}
        for row in [*rows, *same]:
            told = f"{row.label:18} {row.chunks:6} {_number(row.worst)} {_number(row.median)} {off_by(row, whole)}  "
            for level in LEVELS:
                here = self.of(row, level)
                more, error = here.minus(self.of(whole, level))
                errors = more / math.hypot(error, math.sqrt(2) * luck[level])
                told += f" {here.mean:9.6f} ±{here.error:.6f} {more:+8.5f} {errors:+5.1f}"
            print(told + (f"  {row.note}" if row.note else ""), flush=True)


def digest(path: Path) -> str:
    """Of the sums: a file's counts and names do not change a level."""
    matrix = read(path).matrix
    content = hashlib.sha256()
    for name in sorted(matrix.entries):
        entry = matrix.entries[name]
        content.update((entry.sums / entry.counts[:, None]).tobytes())
    return content.hexdigest()[:16]


def off_by(made: Made, whole: Made) -> str:
    """How far the matrix really is from the whole text's: worst and median tensor."""
    here, there = read(made.path).matrix, read(whole.path).matrix
    moved = sorted(distance(here.entries[name], there.entries[name]) for name in there.entries)
    return f"{moved[-1]:6.3f} {moved[len(moved) // 2]:6.3f}"


def _number(value: float | None) -> str:
    return f"{value:6.3f}" if value is not None else "     -"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="programs at once, of one thread each")
    parser.add_argument("--tolerances", type=float, nargs="*", default=TOLERANCES)
    options = parser.parse_args()
    began = time.monotonic()
    tools = BareTools(require(locate(None, env=os.environ, cache=cache_dir())))
    print(f"{tools.toolchain.identity()}; {resource(DEMO_MODEL).name}, levels {', '.join(LEVELS)}")
    with tempfile.TemporaryDirectory(prefix="imatrix-runner-bench-") as name:
        folder = Path(name)
        documents, held_out = read_corpus(SHARES)
        long, unseen = folder / "library.txt", folder / "held-out.txt"
        long.write_text("\n".join(documents), encoding="utf-8")
        unseen.write_text(held_out, encoding="utf-8")
        bench = Bench(tools, folder, options.workers)
        bench.keep_base(unseen)
        for text in (Text(long, 512), Text(resource(CALIBRATION_TEXT), 128)):
            print(f"\n{text.path.name} at -c {text.n_ctx}")
            never = ("--until-converged", "1e-9")
            jobs: list[Any] = [
                (bench.prefixes, text, "order", "first"),
                (bench.prefixes, text, "spread", "spread", *never),
            ]
            jobs += [(bench.converged, text, tolerance) for tolerance in options.tolerances]
            first, spread, *stopped = bench.both(*jobs)
            rows, whole = [*first, *spread, *stopped], first[-1]
            same = bench.shaken(whole)
            bench.measure([*rows, *same])
            bench.table(rows, whole, same)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
