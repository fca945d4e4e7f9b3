"""The solver of mixes against the textbook's table over all sizes: seconds, states and memory, for models of real shapes.

Sensitivities are drawn at random. The table is left out where its back pointers would take more than ``--table-gib`` of memory;
the solver's bound proves its solution either way.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Iterator, Sequence

import numpy as np

from imatrix_runner.files import human_bytes
from imatrix_runner.mixes.solve import Choice, Item, Solver
from imatrix_runner.models.ggml_types import tensor_bytes, type_id

TYPES = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
SHARES = (0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95)
"""Budgets, from the smallest file (0) to the largest (1)."""

Shape = tuple[str, int, int]


def dense(n_layers: int, width: int, inner: int, n_kv: int, n_words: int) -> Iterator[Shape]:
    yield from (("token_embd", width, n_words), ("output", width, n_words))
    for layer in range(n_layers):
        yield from ((f"blk.{layer}.attn_{name}", width, width) for name in ("q", "output"))
        yield from ((f"blk.{layer}.attn_{name}", width, n_kv) for name in ("k", "v"))
        yield from ((f"blk.{layer}.ffn_{name}", width, inner) for name in ("gate", "up"))
        yield f"blk.{layer}.ffn_down", inner, width


def experts(n_layers: int, width: int, inner: int, n_experts: int, n_words: int) -> Iterator[Shape]:
    for name, columns, rows in dense(n_layers, width, inner, width // 4, n_words):
        if "ffn" in name:
            yield f"{name}_exps", columns, rows * n_experts
        yield name, columns, rows  # the shared expert


MODELS = {
    "8B (Llama 3)": tuple(dense(32, 4096, 14336, 1024, 128256)),
    "70B (Llama 3)": tuple(dense(80, 8192, 28672, 1024, 128256)),
    "30B, 128 experts": tuple(experts(48, 2048, 768, 128, 151936)),
}


def items_of(shapes: Sequence[Shape]) -> list[Item]:
    chance = np.random.default_rng(0)
    items = []
    for name, columns, rows in shapes:
        sensitivity = 1e-3 * (columns * rows) ** 0.4 * math.exp(chance.normal(0, 1.2))
        exponent = chance.normal(1, 0.1)
        choices = []
        for kind in TYPES:
            n_bytes = tensor_bytes((columns, rows), type_id(kind) or 0)
            assert n_bytes is not None
            error = 4 ** (-8 * n_bytes / columns / rows) * math.exp(chance.normal(0, 0.1))
            choices.append(Choice(kind, n_bytes, sensitivity * error**exponent))
        items.append(Item((name,), tuple(choices)))
    return items


def table(items: Sequence[Item], budget: int, most_bytes: float) -> str:
    """The textbook's way: the least cost for every size, tensor by tensor."""
    least = [min(choice.n_bytes for choice in item.choices) for item in items]
    steps = [[choice.n_bytes - low for choice in item.choices] for item, low in zip(items, least, strict=True)]
    unit = math.gcd(*(step for each in steps for step in each))
    n_sizes = (budget - sum(least)) // unit + 1
    size = f"{n_sizes:,} sizes, back pointers of {human_bytes(n_sizes * len(items))}"
    if n_sizes * len(items) > most_bytes:
        return f"{size}: left out"
    began = time.perf_counter()
    costs = np.zeros(n_sizes)
    for item, each in zip(items, steps, strict=True):
        after = np.full(n_sizes, np.inf)
        for choice, step in zip(item.choices, each, strict=True):
            start = min(step // unit, n_sizes)
            np.minimum(after[start:], costs[: n_sizes - start] + choice.cost, out=after[start:])
        costs = after
    return f"{size}: {time.perf_counter() - began:.1f} s, cost {costs[-1]:.9f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table-gib", type=float, default=0.5)
    options = parser.parse_args()
    for model, shapes in MODELS.items():
        items = items_of(shapes)
        solver, narrow = Solver.of(items), Solver.of(items, max_states=1)
        least, most = solver.range()
        seconds, gaps, losses = [], [], []
        for share in SHARES:
            budget = least + int(share * (most - least))
            began = time.perf_counter()
            found = solver.within(budget)
            seconds.append(time.perf_counter() - began)
            assert found.exact
            quick = narrow.within(budget)
            gaps.append(quick.gap)
            losses.append(quick.cost / found.cost - 1)
        print(f"{model}: {len(items)} tensors, {len(TYPES)} types, {human_bytes(least)} to {human_bytes(most)}")
        print(f"  exact: {np.mean(seconds):.3f} s a budget, {max(seconds):.3f} s at most")
        print(f"  one state (the relaxation, rounded): {max(losses):.1e} worse at most, {max(gaps):.1e} by its own bound")
        half = (least + most) // 2
        print(f"  half: cost {solver.within(half).cost:.9f}; table: {table(items, half, options.table_gib * (1 << 30))}")
        print(f"  memory of the process so far: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB", flush=True)


if __name__ == "__main__":
    main()
