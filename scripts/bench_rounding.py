"""``scripts/bench rounding``: other numbers in stock types, alone and in mixes, against stock with and without imatrix.

For every model and level: the stock level with and without imatrix, the same types with a refined search and with error
feedback, and a mix of the level's size with error feedback, all made by the command line as a user makes them. Each file is
compared with the source on two held-out texts of different kinds that no search saw, as in ``scripts/bench mixes``, whose
columns these are. A level that its guard replaced by stock counts as 1.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_mixes import LEVELS, Bench, Compared, command, compared, show, texts
from bench_sources import PUBLISHED, source

from imatrix_runner.toolchain.store import cache_dir

_KINDS = ("refined", "feedback", "feedback mix")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench rounding", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["demo", *PUBLISHED])
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--kinds", nargs="+", default=list(_KINDS), choices=_KINDS)
    parser.add_argument("--chunks", type=int, help="measure the first N chunks of each text (default: all)")
    parser.add_argument("--options", type=shlex.split, default=[], help="further options of run: --options='--threads 1'")
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench" / "rounding", help="where files are kept")
    options = parser.parse_args()
    means: dict[tuple[str, str, str], float] = {}
    for name in options.models:
        bench = RoundingBench(source(name), options.work / name, options.levels, None, options.options)
        bench.make_all(options.kinds)
        for text in texts(options.work):
            for kind in options.kinds:
                rows = list(bench.compare_kind(kind, text, options.chunks))
                show(f"{name}, {kind}", text, rows)
                means[name, kind, text.stem] = math.exp(float(np.mean([math.log(row.ratio) for row in rows])))
    print("\nGeometric mean of the ratios")
    for (name, kind, text), mean in means.items():
        print(f"  {name:10} {kind:14} {text:12} {mean:.3f}")


class RoundingBench(Bench):
    """A bench of levels that are rounded otherwise, next to those of stock."""

    def make_all(self, kinds: list[str]) -> None:
        """What is there already stays."""
        names = [*self.levels, *(f"{kind}-{level}" for kind in kinds if kind != "feedback mix" for level in self.levels)]
        place = ["--work-dir", self.work / "with", *self.options]
        command(["run", self.model, *place, "--imatrix", "generate", "--levels", ",".join(names)])
        if "feedback mix" in kinds:
            mixes = [word for level in self.levels for word in ("--like", level)]
            command(["run", self.model, *place, "--rounding", "feedback", *mixes])
        without = ["--work-dir", self.work / "without", "--imatrix", "none"]
        command(["quantize", self.model, *without, "--levels", ",".join(self.levels)], may_fail=True)

    def compare_kind(self, kind: str, text: Path, chunks: int | None) -> Iterator[Compared]:
        """Each level of one kind against the better stock file of its size."""
        for level in self.levels:
            chosen = self._chosen(kind, level)
            stock = {which: self._scores(which, level, text, chunks) for which in ("with", "without")}
            means = {which: float(scores["kld"].mean()) for which, scores in stock.items() if len(scores)}
            best = min(means, key=lambda which: means[which])
            yield compared(level, chosen, self._scores("with", chosen, text, chunks), stock[best], best)

    def _chosen(self, kind: str, level: str) -> str:
        """The level that a request led to."""
        if kind == "feedback mix":
            return str(self._facts(f"mix MIX@like:{level}")["level"])
        name = f"{kind.upper()}-{level}"
        return level if self._facts(f"rounding {name}")["kept_stock"] else name

    def _facts(self, step: str) -> dict[str, Any]:
        (journal,) = (self.work / "with").glob("*/journal.json")
        facts: dict[str, Any] = json.loads(journal.read_text(encoding="utf-8"))["steps"][step]["facts"]
        return facts


if __name__ == "__main__":
    main()
