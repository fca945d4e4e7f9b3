"""``scripts/bench mixtoy``: every mix of a toy measured, and how near to the best of them the chosen one is.

The toy is a llama of one layer: six tensors get one of four types each, all others stay as they are. All 4^6 mixes are tried in
the loaded model on the same chunks. For budgets from the smallest mix to the largest, the types that the solver chooses are
compared with the best mix that fits:

``probes``: by costs from the probes of a run, which see other chunks and only some of the types. ``alone``: by costs of every
tensor and type, each rounded alone, on the chunks of the mixes: then only that costs do not add up can mislead.
``excess``: KLD of the chosen mix above that of the best, in per cent, with its standard error over chunks; ``rank``: how many
mixes that fit are better.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from imatrix_runner.engines.cost_jobs import Trial, TrialResult
from imatrix_runner.engines.jobs import CollectOptions
from imatrix_runner.mixes.compare_recipes import compare, kld_per_token
from imatrix_runner.mixes.mix_chooser import MixChooser
from imatrix_runner.mixes.mix_problem import MixProblem
from imatrix_runner.mixes.sensitivity import CostModel
from imatrix_runner.mixes.solve import Choice, Item, Solver
from imatrix_runner.toolchain.store import cache_dir
from support.mixing import Mixing
from support.tiny_models import sample_text, write_llama_gguf

TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q6_K")
FIXED = ("token_embd=bf16", "attn_q=bf16", "attn_k=bf16")
SHARES = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
"""Budgets, from the smallest mix (0) to the largest (1)."""
MANY = 200
"""Budgets, evenly spread, for the summary."""

Types = tuple[str, ...]
"""Of the toy's tensors, in order."""


@dataclass(frozen=True)
class Toy:
    """The problem and all that was measured: ``mixes`` by their types, ``probed`` and ``alone`` the costs from both ways."""

    problem: MixProblem
    mixes: Mapping[Types, TrialResult]
    probed: CostModel
    alone: CostModel

    def n_bytes(self, types: Types) -> int:
        sizes = (tensor.padded_bytes(kind) for tensor, kind in zip(self.problem.tensors, types, strict=True))
        return self.problem.fixed_bytes + sum(sizes)

    def chosen(self, costs: CostModel, budget: int) -> Types:
        items = [
            Item(
                (tensor.name,),
                tuple(Choice(kind, tensor.padded_bytes(kind), costs.cost(tensor.rounded(kind))) for kind in TYPES),
            )
            for tensor in self.problem.tensors
        ]
        return tuple(TYPES[pick] for pick in Solver.of(items, self.problem.fixed_bytes).within(budget).picks)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench mixtoy", description=__doc__)
    parser.add_argument("--work", type=Path, default=cache_dir() / "bench" / "mixtoy", help="where files are kept")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    show(measured(options.work))


def measured(work: Path) -> Toy:
    """Everything that is not known from an earlier call is measured; this takes minutes."""
    model = write_llama_gguf(work / "toy-BF16.gguf", layers=1, fluent=True)
    text = work / "words.txt"
    text.write_text(sample_text(21000), encoding="utf-8")
    words = ["imatrix", "generate", model, "-f", text, "-c", "128", "--work-dir", work / "imatrix", "-q"]
    subprocess.run([sys.executable, "-m", "imatrix_runner", *map(str, words)], check=True)
    mixing = Mixing.of(model, work / "imatrix" / "toy" / "imatrix.gguf", work / "toy", *FIXED)
    problem = mixing.problem(TYPES)
    measurement = mixing.measurement(text, CollectOptions(n_ctx=128))
    errors = measurement.errors([tensor.rounded(kind) for tensor in problem.tensors for kind in TYPES])
    probes = MixChooser(problem, measurement, work / "mix.json").probes()
    single = tuple(
        Trial(f"alone {tensor.name} {kind}", (tensor.rounded(kind),)) for tensor in problem.tensors for kind in TYPES
    )
    combined = {
        types: Trial(
            " ".join(types),
            tuple(tensor.rounded(kind) for tensor, kind in zip(problem.tensors, types, strict=True)),
        )
        for types in product(TYPES, repeat=len(problem.tensors))
    }
    results = measurement.recipes((*single, *combined.values()))
    return Toy(
        problem,
        {types: results[trial.name] for types, trial in combined.items()},
        CostModel.of(errors.values(), probes, measurement.probes(probes).values()),
        CostModel.of(errors.values(), single, [results[trial.name] for trial in single]),
    )


def show(toy: Toy) -> None:
    names = [tensor.name for tensor in toy.problem.tensors]
    klds = {types: kld_per_token(result) for types, result in toy.mixes.items()}
    sizes = {types: toy.n_bytes(types) for types in toy.mixes}
    some = next(iter(toy.mixes.values()))
    print(f"{len(toy.mixes)} mixes of {', '.join(names)} ({', '.join(TYPES)})")
    print(f"{sum(some.tokens)} tokens scored in {len(some.chunks)} chunks")
    for title, costs in (("probes", toy.probed), ("alone", toy.alone)):
        sums = {
            types: sum(costs.cost(tensor.rounded(kind)) for tensor, kind in zip(toy.problem.tensors, types, strict=True))
            for types in toy.mixes
        }
        ratios = np.array([sums[types] / klds[types] for types in toy.mixes])
        spread = np.log(ratios).std()
        print(f"costs by {title}: sum over measured KLD {np.median(ratios):.2f}, deviation of its log {spread:.3f}")
    least, most = min(sizes.values()), max(sizes.values())
    columns = "".join(f" {title:>9} {'excess':>14} {'rank':>5}" for title in ("probes", "alone"))
    print(f"{'budget':>9} {'bits':>5} {'best':>9}{columns}    of")
    for share in SHARES:
        budget = least + int(share * (most - least))
        fit = [types for types in toy.mixes if sizes[types] <= budget]
        best = min(fit, key=lambda types: klds[types])
        row = f"{budget:9,} {bits(toy, budget):5.2f} {klds[best]:9.5f}"
        for costs in (toy.probed, toy.alone):
            chosen = toy.chosen(costs, budget)
            against = compare(toy.mixes[chosen], toy.mixes[best])
            rank = sum(klds[types] < klds[chosen] for types in fit)
            row += f" {klds[chosen]:9.5f} {100 * (against.ratio - 1):5.1f} +- {100 * against.error:3.1f} % {rank:5}"
        print(f"{row} {len(fit):5}")
    budgets = np.linspace(least, most, MANY, dtype=int).tolist()
    lowest = [min(kld for types, kld in klds.items() if sizes[types] <= budget) for budget in budgets]
    for title, costs in (("probes", toy.probed), ("alone", toy.alone)):
        excesses = np.array([klds[toy.chosen(costs, budget)] / low - 1 for budget, low in zip(budgets, lowest, strict=True)])
        mean, worst = 100 * excesses.mean(), 100 * excesses.max()
        best, near = 100 * (excesses == 0).mean(), 100 * (excesses <= 0.01).mean()
        print(f"{MANY} budgets by {title}: {mean:.2f} % above the best, {worst:.1f} % at most")
        print(f"  the best itself for {best:.0f} % of them, within 1 % for {near:.0f} %")


def bits(toy: Toy, n_bytes: int) -> float:
    """Bits per weight of the six tensors."""
    weights: Sequence[int] = [int(np.prod(tensor.shape)) for tensor in toy.problem.tensors]
    return 8 * (n_bytes - toy.problem.fixed_bytes) / sum(weights)


if __name__ == "__main__":
    main()
