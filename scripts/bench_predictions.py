"""``scripts/bench predictions``: the KLD of stock levels as the cost map predicts it, against what is measured.

For every model: the imatrix of the shipped calibration text, one mix, which leaves the cost map, and all stock levels whose
types the map knows, measured on the shipped held-out text; all by the command line as a user makes them. Then every level is
predicted from what was measured of others: of the stock level that the mix was compared with, on the calibration text; and of
each other level, and each two and three others, on the held-out text.

``costs apart``: ratio of the costs of a level to those of the next measured one. ``off``, ``90 %``: median and 90th percentile
of how far predictions are off, as factors.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from bench_sources import PUBLISHED, source

from imatrix_runner.engines.levels import offered
from imatrix_runner.evaluate.measurements import measured
from imatrix_runner.imatrix.formats import read
from imatrix_runner.journal import Journal
from imatrix_runner.mixes.cost_map import read_cost_map
from imatrix_runner.mixes.level_costs import FARTHEST, LevelCosts, ScaledKld
from imatrix_runner.mixes.mix_facts import levels_of_targets
from imatrix_runner.toolchain.store import cache_dir
from support.mixing import Mixing

LEVELS = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M"),
    *("Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench predictions", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["demo", *PUBLISHED])
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--chunks", type=int, help="measure the first N chunks of the held-out text (default: all)")
    parser.add_argument("--calibration-chunks", type=int, help="of the imatrix (default: all)")
    parser.add_argument("--like", default="Q4_K_M", help="the mix's size")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench" / "predictions", help="where files are kept")
    options = parser.parse_args()
    for name in options.models:
        model, work = source(name), options.work / name
        make(model, work, options.levels, options.like, options.calibration_chunks, options.chunks)
        (journal,) = work.glob("*/journal.json")
        show(name, model, journal.parent)


def make(model: Path, work: Path, levels: Sequence[str], like: str, calibration_chunks: int | None, chunks: int | None) -> None:
    """The cost map, the levels and their figures; what is there already stays."""
    few = ["--chunks", str(calibration_chunks)] if calibration_chunks else []
    command("run", model, "--work-dir", work, "--imatrix", "generate", "--levels", ",".join(levels), "--like", like, *few)
    command("evaluate", model, "--work-dir", work, *(["--chunks", str(chunks)] if chunks else []))


def command(*words: str | Path) -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    subprocess.run([sys.executable, "-m", "imatrix_runner", *map(str, words)], env=environment, check=True)


def show(name: str, model: Path, workspace: Path) -> None:
    journal = Journal(workspace / "journal.json")
    figures = {level: each.divergence.kld.value for level, each in measured(journal).items()}
    mixing = Mixing.of(model, workspace / "imatrix.gguf", workspace)
    stock = offered(mixing.planner.session.engine.types)
    wanted = [stock[level] for level in figures if level in stock]
    recipes = mixing.planner.recipes(wanted, read(mixing.imatrix), mixing.input)
    sums = LevelCosts.of(read_cost_map(workspace / "mix.json"), recipes.values())
    klds = {level: kld for level, kld in figures.items() if level in sums.sums}
    span = f"KLD {min(klds.values()):.5f} to {max(klds.values()):.3f}"
    print(f"\n{name}: {len(klds)} levels, {span}, background {sums.background:.2g}")
    tried = {facts.stock: facts.stock_kld for facts in levels_of_targets(journal).values() if facts.stock_kld is not None}
    by_tried = sums.predicted(tried)
    print(f"{'level':8} {'sum':>9} {'measured':>9} {'by the tried':>13}")
    for level, kld in sorted(klds.items(), key=lambda item: item[1]):
        shown = f"{by_tried[level].kld:13.5f}" if level in by_tried else ""
        print(f"{level:8} {sums.sums[level]:9.5f} {kld:9.5f} {shown}")
    print(f"{'from':24} {'costs apart':>12} {'predictions':>12} {'off':>6} {'90 %':>6}")
    report("a level tried", [(each.apart, _off(each, klds[level])) for level, each in by_tried.items() if level in klds])
    for count in (1, 2, 3):
        report(f"{count} measured", list(left_out(sums, klds, count)))


def left_out(sums: LevelCosts, klds: Mapping[str, float], count: int) -> Iterator[tuple[float, float]]:
    """How far from the next measured level a level is, and how far its prediction is off, of all levels by each ``count``
    others."""
    for some in combinations(klds, count):
        for level, each in sums.predicted({name: klds[name] for name in some}).items():
            if level in klds and level not in some:
                yield each.apart, _off(each, klds[level])


def _off(predicted: ScaledKld, kld: float) -> float:
    return abs(math.log(predicted.kld / kld))


def report(title: str, found: Sequence[tuple[float, float]]) -> None:
    for least, most in pairwise((1.0, 2.0, 4.0, 8.0, FARTHEST)):
        off = np.array([each for apart, each in found if least <= apart < most])
        if len(off):
            median, high = np.exp(np.quantile(off, (0.5, 0.9)))
            print(f"{title:24} {f'{least:g}-{most:g}':>12} {len(off):12} {median:6.2f} {high:6.2f}")


if __name__ == "__main__":
    main()
