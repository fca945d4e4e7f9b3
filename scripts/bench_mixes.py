"""``scripts/bench mixes``: mixes against the better of stock with and without imatrix, at the stock levels' exact sizes.

For every model: the imatrix of the shipped calibration text, the stock levels with it and without, and a mix of each level's
size, all made by the command line as a user makes them. Then each file is compared with the source on two held-out texts of
different kinds: the shipped one, and code of Python's standard library. Neither is seen by any search.

``ratio``: mean KLD over the text relative to the better stock file. ``median``: of the chunks' own ratios. ``95 %``: bootstrap
over chunks, in pairs. ``top``: difference of the shares of tokens with the source's top token, in points; ``ln ppl``:
|ln(PPL / PPL of the source)| of the stock file and of the mix. A mix that its guard replaced by the stock level counts as 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bench_sources import PUBLISHED, source
from demo_corpus import read_corpus

from imatrix_runner.engines.embedded.bindings import find
from imatrix_runner.engines.embedded.engine import EmbeddedEngine
from imatrix_runner.engines.files.token_scores import read_token_scores
from imatrix_runner.engines.jobs import ChunkRange, CollectOptions
from imatrix_runner.engines.measures import MeasureJob, ReferenceJob
from imatrix_runner.events import ignore
from imatrix_runner.files import sha256
from imatrix_runner.process import Runner
from imatrix_runner.resources import HELD_OUT_TEXT, resource
from imatrix_runner.toolchain.store import cache_dir

LEVELS = ("Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
_CODE_CHARACTERS = 120_000
_DRAWS = 2000
Scores = npt.NDArray[np.void]


@dataclass(frozen=True)
class Compared:
    """A mix against the better stock file of its size, on one text."""

    level: str
    chosen: str
    stock: float
    which: str
    ratio: float
    low: float
    high: float
    median: float
    top: float
    ln_ppl_stock: float
    ln_ppl: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench mixes", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["demo", *PUBLISHED])
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--chunks", type=int, help="measure the first N chunks of each text (default: all)")
    parser.add_argument("--calibration-chunks", type=int, help="of the imatrix (default: all)")
    parser.add_argument("--options", type=shlex.split, default=[], help="further options of run: --options='--quality high'")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench" / "mixes", help="where files are kept")
    options = parser.parse_args()
    means: dict[tuple[str, str], float] = {}
    for name in options.models:
        bench = Bench(source(name), options.work / name, options.levels, options.calibration_chunks, options.options)
        bench.make()
        for text in texts(options.work):
            rows = list(bench.compare(text, options.chunks))
            show(name, text, rows)
            means[name, text.stem] = math.exp(float(np.mean([math.log(row.ratio) for row in rows])))
    print("\nGeometric mean of the ratios (goal: 0.60 for demo, 0.75 for the others)")
    for (name, text), mean in means.items():
        print(f"  {name:10} {text:12} {mean:.3f}")


def texts(folder: Path) -> Iterable[Path]:
    """The shipped held-out text, and code that no calibration text holds."""
    code = folder / "code.txt"
    if not code.is_file():
        code.parent.mkdir(parents=True, exist_ok=True)
        code.write_text(read_corpus(())[1][:_CODE_CHARACTERS], encoding="utf-8")
    return resource(HELD_OUT_TEXT), code


@dataclass(frozen=True)
class Bench:
    model: Path
    work: Path
    levels: Sequence[str]
    calibration_chunks: int | None
    options: Sequence[str]

    def make(self) -> None:
        """Stock levels with and without imatrix, and the mixes; what is there already stays."""
        chunks = ["--chunks", str(self.calibration_chunks)] if self.calibration_chunks else []
        mixes = [word for level in self.levels for word in ("--like", level)]
        names = ["--levels", ",".join(self.levels)]
        command(
            [
                "run",
                self.model,
                "--work-dir",
                self.work / "with",
                "--imatrix",
                "generate",
                *names,
                *chunks,
                *mixes,
                *self.options,
            ]
        )
        command(["quantize", self.model, "--work-dir", self.work / "without", "--imatrix", "none", *names], may_fail=True)

    def compare(self, text: Path, chunks: int | None) -> Iterator[Compared]:
        (folder,) = (self.work / "with").glob("*/journal.json")
        steps = json.loads(folder.read_text(encoding="utf-8"))["steps"]
        for level in self.levels:
            chosen = steps[f"mix MIX@like:{level}"]["facts"]["level"]
            stock = {which: self._scores(which, level, text, chunks) for which in ("with", "without")}
            means = {which: float(scores["kld"].mean()) for which, scores in stock.items() if len(scores)}
            best = min(means, key=lambda which: means[which])
            yield compared(level, chosen, self._scores("with", chosen, text, chunks), stock[best], best)

    def _scores(self, which: str, level: str, text: Path, chunks: int | None) -> Scores:
        """The token scores of a level, [n_chunks, n_tokens]; empty if there is no such file."""
        (workspace,) = (journal.parent for journal in (self.work / which).glob("*/journal.json"))
        file = workspace / f"{workspace.name}-{level}.gguf"
        if not file.is_file():
            return np.zeros((0, 1), [("kld", "<f8")])
        return scores(self.model, file, text, self.work / "scores", chunks)


def scores(model: Path, level: Path, text: Path, folder: Path, chunks: int | None) -> Scores:
    """The comparison of a level with its source on a text, kept by content."""
    folder.mkdir(parents=True, exist_ok=True)
    engine = EmbeddedEngine(find(os.environ, cache_dir()), Runner(), cache_dir())
    options = CollectOptions()
    count = engine.count_tokens(model, text, parse_special=False, log=None) // options.n_ctx
    count = min(count, chunks or count)
    what = f"{text.stem}-{sha256(text)[:12]}-{count}"
    base, out = folder / f"{what}.logits", folder / f"{what}-{sha256(level)[:16]}.scores"
    found = read_token_scores(out, "bench", options.n_ctx)
    if len(found) < count or not exact(base).is_file():
        scored = (exact(base), "bench")
        job = ReferenceJob("reference", model, text, ChunkRange(0, count), base, options, "bench", None, scored)
        engine.make_reference(job, ignore)
        engine.measure_level(MeasureJob("measure", level, base, out, options, "bench", None), ignore)
        found = read_token_scores(out, "bench", options.n_ctx)
    # What the file of log-probabilities says of unlikely tokens is cut off.
    found = found.copy()
    found["base"] = read_token_scores(exact(base), "bench", options.n_ctx)["nll"]
    return found


def exact(base: Path) -> Path:
    return base.with_suffix(".exact")


def compared(level: str, chosen: str, mix: Scores, stock: Scores, which: str) -> Compared:
    mine, other = mix["kld"].mean(axis=1), stock["kld"].mean(axis=1)
    draws = np.random.default_rng(0).integers(0, len(mine), (_DRAWS, len(mine)))
    drawn = mine[draws].sum(axis=1) / other[draws].sum(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Compared(
        level,
        chosen,
        float(other.mean()),
        which,
        float(mine.sum() / other.sum()),
        float(low),
        float(high),
        float(np.median(mine / other)),
        100 * float(mix["same"].mean() - stock["same"].mean()),
        abs(float((stock["nll"] - stock["base"]).mean())),
        abs(float((mix["nll"] - mix["base"]).mean())),
    )


def show(model: str, text: Path, rows: Sequence[Compared]) -> None:
    print(f"\n{model}, {text.name}")
    print(
        f"  {'size of':8} {'mix':28} {'stock KLD':>10} {'imatrix':8} {'ratio':>6} {'95 %':>12} {'median':>7} {'top':>6} "
        f"{'|ln ppl|':>8}"
    )
    for row in rows:
        span = f"{row.low:.2f}-{row.high:.2f}"
        print(
            f"  {row.level:8} {row.chosen:28} {row.stock:10.5f} {row.which:8} {row.ratio:6.3f} {span:>12} {row.median:7.3f} "
            f"{row.top:+6.2f} {row.ln_ppl_stock:8.5f} -> {row.ln_ppl:7.5f}",
            flush=True,
        )


def command(arguments: Sequence[object], *, may_fail: bool = False) -> None:
    words = [sys.executable, "-m", "imatrix_runner", *map(str, arguments)]
    done = subprocess.run(words, check=False)
    if done.returncode and not (may_fail and done.returncode == 100):
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}")


if __name__ == "__main__":
    main()
