"""``scripts/bench convergence``: how the demo model's levels depend on the text its matrix saw, and what stopping early costs.

Matrices of the first N chunks of a text, of N chunks scattered over it, and of what ``--until-converged TOL`` takes, with its
own ranges and with ranges of one batch; levels made with each; their KL divergence from the BF16 model on the files that model
never saw. ``worst`` and ``median`` are the errors estimated on the way, ``off by`` the distance from the whole text's matrix.

``more`` is the difference to the whole text, ``s.e.`` that in standard errors. The whole text stands for the mean of its matrix
and of four that are shaken by 1 % in every column. In the error are the held-out text (all are measured on the same chunks, so
from chunk to chunk) and the luck of rounding: what those five, which are as good as each other, differ by (over all texts).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from demo_corpus import read_corpus

from imatrix_runner.imatrix.convergence import Point, converged, distance
from imatrix_runner.imatrix.formats import read, write_gguf
from imatrix_runner.imatrix.matrix import MatrixEntry
from imatrix_runner.resources import CALIBRATION_TEXT, DEMO_MODEL, resource
from imatrix_runner.toolchain.locate import locate, require
from imatrix_runner.toolchain.store import cache_dir
from support.command_line import run_command
from support.divergence import Divergence, divergence, save_logits
from support.llama_tools import BareTools

LEVELS = ("IQ2_XXS", "Q2_K", "Q4_K_M")
N_BATCH = 2048
TOKENS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
TOLERANCES = (0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005)
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


@dataclass(frozen=True)
class Table:
    """What was made of a text; ``equals`` are the matrix of all of it and that matrix shaken."""

    text: Text
    rows: list[Made]
    equals: list[Made]


class Bench:
    def __init__(self, tools: BareTools, folder: Path, workers: int, levels: Sequence[str] = LEVELS) -> None:
        self.levels = tuple(levels)
        self._tools, self.folder, self._pool = tools, folder, ThreadPoolExecutor(workers)
        self._model = resource(DEMO_MODEL)
        self._base = folder / "base.kld"
        self._measured: dict[tuple[str, str], Divergence] = {}

    def keep_base(self, held_out: Path) -> None:
        save_logits(self._tools, self._model, held_out, self._base)

    def generate(self, text: Text, name: str, *options: str) -> tuple[Path, dict[str, Any]]:
        """The command line itself, in a folder of its own; the file and what the document says of how it was collected."""
        folder = self.folder / f"{text.path.stem}-{name}"
        out = folder / "imatrix.gguf"
        arguments = ["imatrix", "generate", str(self._model), "-f", str(text.path), "-c", str(text.n_ctx), "-o", str(out)]
        arguments += ["--work-dir", str(folder / "work"), "--no-ppl", "-t", "1", "--engine", "embedded", "--json", *options]
        folder.mkdir()
        ran = run_command(*arguments, cwd=folder, seconds=3600)
        if ran.code:
            raise SystemExit(ran.err)
        return out, ran.document["collected"]

    def prefixes(self, text: Text, name: str, *options: str) -> list[Made]:
        """The matrix after every range of one collection of the whole text."""
        out, facts = self.generate(text, name, "--save-frequency", "1", *options)
        curve = {point["chunks"]: point for point in facts["curve"]}
        made: list[Made] = []
        for path in out.parent.glob(f"{out.name}*"):
            chunks = int(path.name.removeprefix(f"{out.name}.at_")) if path != out else facts["chunks"]
            point = curve.get(chunks, {})
            made.append(Made(name, path, chunks, point.get("worst"), point.get("median")))
        return sorted(made, key=lambda item: item.chunks)

    def default(self, text: Text) -> Made:
        """What the command takes when it may stop, as nobody told it more."""
        out, facts = self.generate(text, "default", "--until-converged")
        last = facts["curve"][-1]
        return Made("--until-converged", out, facts["chunks"], last["worst"], last["median"], facts["stopped"])

    def shaken(self, whole: Made) -> list[Made]:
        """The same matrix a few times, each column off by some 1 %."""
        matrix = read(whole.path).matrix
        made: list[Made] = []
        for seed in range(SHAKES):
            draw = np.random.default_rng(seed)
            entries = {name: matrix.entries[name] for name in matrix.entries}
            moved = {
                name: MatrixEntry(entry.sums * draw.normal(1, SHAKEN, entry.sums.shape), entry.counts)
                for name, entry in entries.items()
            }
            path = whole.path.with_name(f"shaken-{seed}.gguf")
            write_gguf(replace(matrix, entries=moved), path)
            made.append(Made(f"all, shaken by {SHAKEN:.0%}", path, whole.chunks))
        return made

    def measure(self, made: Iterable[Made]) -> None:
        """The divergence of every level with every matrix; equal matrices are measured once."""
        jobs = {(digest(item.path), level): item.path for item in made for level in self.levels}
        jobs = {job: path for job, path in jobs.items() if job not in self._measured}
        self._measured.update(zip(jobs, self._pool.map(self._divergence, jobs, jobs.values()), strict=True))

    def _divergence(self, job: tuple[str, str], matrix: Path) -> Divergence:
        digest, level = job
        out = self._tools.quantize(self._model, self.folder / f"{digest}-{level}.gguf", level, imatrix=matrix)
        measured = divergence(self._tools, out, self._base)
        out.unlink()
        return measured

    def of(self, made: Made, level: str) -> Divergence:
        return self._measured[digest(made.path), level]

    def at_once(self, *jobs: Any) -> list[Any]:
        return [future.result() for future in [self._pool.submit(*job) for job in jobs]]

    def compare(self, text: Text, tolerances: Sequence[float]) -> Table:
        """Make and measure all matrices of a text."""
        fine, never = ("-ofreq", str(text.batch)), ("--until-converged", "1e-9")
        order, spread, ranges, default = self.at_once(
            (self.prefixes, text, "first", *fine),
            (self.prefixes, text, "spread", *fine, *never),
            (self.prefixes, text, "ranges", *never),
            (self.default, text),
        )
        whole = replace(order[-1], label="all")
        shown = [tokens // text.n_ctx for tokens in TOKENS]
        rows = [item for made in (order[:-1], spread[:-1]) for item in made if item.chunks in shown]
        rows += stops(ranges, "until", tolerances)
        rows += [*stops(spread, "batches, until", tolerances), default]
        table = Table(text, rows, [whole, *self.shaken(whole)])
        self.measure([*table.rows, *table.equals])
        return table

    def show(self, table: Table, luck: Mapping[str, float]) -> None:
        print(f"\n{table.text.path.name} at -c {table.text.n_ctx}")
        scored = " ".join(f"{level + ' KLD':>19} {'more':>7} {'s.e.':>5}" for level in LEVELS)
        print(f"{'matrix':20} {'chunks':>6} {'worst':>6} {'median':>6} {'off by':>13}  {scored}")
        best = {level: average([self.of(made, level) for made in table.equals]) for level in LEVELS}
        for row in [*table.rows, *table.equals]:
            told = f"{row.label:20} {row.chunks:6} {_number(row.worst)} {_number(row.median)} {off_by(row, table.equals[0])}  "
            for level in LEVELS:
                here, mean = self.of(row, level), best[level].mean
                more, error = here.minus(best[level])
                errors = more / math.hypot(error, luck[level] * mean * math.sqrt(1 + 1 / len(table.equals)))
                told += f" {here.mean:9.6f} ±{here.error:.6f} {100 * more / mean:+6.2f}% {errors:+5.1f}"
            print(told + (f"  {row.note}" if row.note else ""), flush=True)

    def luck(self, tables: Sequence[Table], level: str) -> float:
        """The relative standard deviation of the divergence over matrices that are as good as each other."""
        means = [np.array([self.of(made, level).mean for made in table.equals]) for table in tables]
        return math.sqrt(np.mean([np.var(values / values.mean(), ddof=1) for values in means]))


def average(equals: Sequence[Divergence]) -> Divergence:
    """Of matrices that are as good as each other: less of the luck of rounding."""
    chunks = np.mean([one.chunks for one in equals], axis=0)
    return Divergence(float(np.mean([one.mean for one in equals])), equals[0].error, chunks)


def stops(made: Sequence[Made], label: str, tolerances: Iterable[float]) -> Iterator[Made]:
    """Where a collection would have stopped at each tolerance: its ranges come in the same order whatever the tolerance."""
    curve = [Point(item.chunks, item.worst, "", item.median or 0.0) for item in made if item.worst is not None]
    for tolerance in tolerances:
        chunks = converged(curve, tolerance)
        item = next((item for item in made if item.chunks == chunks), made[-1])
        yield replace(item, label=f"{label} {tolerance:g}", note="" if chunks else "the whole text")


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
        texts = (Text(long, 512), Text(resource(CALIBRATION_TEXT), 128))
        tables = [bench.compare(text, options.tolerances) for text in texts]
        luck = {level: bench.luck(tables, level) for level in LEVELS}
        for table in tables:
            bench.show(table, luck)
    print("\nluck of rounding: " + ", ".join(f"{level} {value:.2%}" for level, value in luck.items()))
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
