"""The solver: no solution of a small problem is better, sizes and costs are those of the picks, bounds are bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.mixes.solve import Choice, Item, Solution, Solver

TYPES = ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
BLOCKS = dict(zip(TYPES, (50, 66, 74, 82, 84, 98, 110, 136, 144, 176, 210, 272), strict=True))
"""Bytes of 256 elements."""
SIXTEENTHS = st.integers(0, 200).map(lambda number: number / 16)
"""Costs whose sums are exact."""


def toy(n_items: int = 6, n_choices: int = 4, seed: int = 0) -> tuple[Item, ...]:
    chance = np.random.default_rng(seed)
    sizes = chance.integers(1, 1000, (n_items, n_choices)).tolist()
    costs = (chance.integers(0, 1 << 20, (n_items, n_choices)) / (1 << 16)).tolist()
    return tuple(
        Item((f"blk.{number}",), tuple(Choice(f"Q{n}", size, cost) for n, (size, cost) in enumerate(zip(*row, strict=True))))
        for number, row in enumerate(zip(sizes, costs, strict=True))
    )


def dense(width: int, n_layers: int, n_words: int, seed: int = 0) -> tuple[Item, ...]:
    """A model shaped like Llama: the tensors of each layer with a sensitivity by chance, embeddings and output."""
    kinds = {"q": (1, 1), "k": (1, 4), "v": (1, 4), "output": (1, 1), "gate": (3.5, 1), "up": (3.5, 1), "down": (3.5, 1)}
    layers = {f"blk.{n}.{kind}": int(width * width * up / down) for n in range(n_layers) for kind, (up, down) in kinds.items()}
    return rounded({**layers, "token_embd": width * n_words, "output": width * n_words}, seed)


def experts(n_layers: int, seed: int = 0) -> tuple[Item, ...]:
    """A model shaped like Qwen3-30B-A3B: few bytes in most tensors, most in the experts."""
    kinds = {"q": 2**23, "k": 2**20, "v": 2**20, "output": 2**23, "gate": 201326592, "up": 201326592, "down": 201326592}
    shared = {"gate_shexp": 2**20 * 3, "up_shexp": 2**20 * 3, "down_shexp": 2**20 * 3}
    layers = {f"blk.{n}.{kind}": elements for n in range(n_layers) for kind, elements in (kinds | shared).items()}
    return rounded({**layers, "token_embd": 2048 * 151936, "output": 2048 * 151936}, seed)


def rounded(elements: dict[str, int], seed: int) -> tuple[Item, ...]:
    chance = np.random.default_rng(seed)
    items = []
    for name, count in elements.items():
        sensitivity, exponent = 1e-3 * count**0.4 * math.exp(chance.normal(0, 1.2)), chance.normal(1, 0.1)
        error = {kind: 2 ** (-block / 16) * math.exp(chance.normal(0, 0.1)) for kind, block in BLOCKS.items()}
        choices = (Choice(kind, count // 256 * BLOCKS[kind], sensitivity * error[kind] ** exponent) for kind in BLOCKS)
        items.append(Item((name,), tuple(choices)))
    return tuple(items)


def sums(items: Sequence[Item], picks: Sequence[int]) -> tuple[int, float]:
    chosen = [item.choices[pick] for item, pick in zip(items, picks, strict=True)]
    return sum(choice.n_bytes for choice in chosen), math.fsum(choice.cost for choice in chosen)


def all_mixes(items: Sequence[Item]) -> list[tuple[int, float]]:
    return [sums(items, picks) for picks in itertools.product(*(range(len(item.choices)) for item in items))]


def best(mixes: Sequence[tuple[int, float]], budget: int) -> tuple[float, int]:
    return min((cost, size) for size, cost in mixes if size <= budget)


def resolution(items: Sequence[Item]) -> float:
    """What all costs together may be rounded by."""
    return 2.0**-52 * len(items) * sum(max(choice.cost for choice in item.choices) for item in items)


def holds(items: Sequence[Item], found: Solution, fixed_bytes: int = 0) -> None:
    """Whether a solution's sums are those of its picks."""
    n_bytes, cost = sums(items, found.picks)
    assert found.n_bytes == n_bytes + fixed_bytes
    assert found.cost == pytest.approx(cost, rel=1e-12, abs=resolution(items))
    assert found.exact == (found.gap == 0)


def test_every_budget_of_a_toy_gets_the_best_of_all_its_mixes() -> None:
    items = toy()
    mixes = all_mixes(items)
    assert len(mixes) == 4**6
    solver = Solver.of(items)
    least, most = solver.range()
    assert (least, most) == (min(size for size, _ in mixes), max(size for size, _ in mixes))
    for budget in (*range(least, most, 37), most):
        found = solver.within(budget)
        holds(items, found)
        assert found.exact
        assert (found.cost, found.n_bytes) == best(mixes, budget)


def test_every_cost_of_a_toy_gets_the_smallest_of_all_its_mixes() -> None:
    items = toy(seed=1)
    mixes = all_mixes(items)
    solver = Solver.of(items)
    for wanted in sorted(cost for _, cost in mixes)[::101]:
        found = solver.reaching(wanted)
        holds(items, found)
        assert found.exact
        assert (found.n_bytes, found.cost) == min(mix for mix in mixes if mix[1] <= wanted)


CHOICES = st.lists(st.builds(Choice, st.just("Q4_K"), st.integers(0, 300), SIXTEENTHS), min_size=1, max_size=5)
ITEMS = st.lists(st.builds(Item, st.just(("a",)), CHOICES.map(tuple)), min_size=1, max_size=5)


@given(ITEMS, st.integers(0, 100), st.floats(0, 1))
def test_no_mix_is_better(items: list[Item], fixed_bytes: int, share: float) -> None:
    """Ties, choices that others beat, equal choices, items with one choice: against all mixes."""
    mixes = all_mixes(items)
    solver = Solver.of(items, fixed_bytes)
    least, most = solver.range()
    budget = least + int(share * (most - least))
    found = solver.within(budget)
    holds(items, found, fixed_bytes)
    assert found.exact
    assert (found.cost, found.n_bytes - fixed_bytes) == best(mixes, budget - fixed_bytes)
    smallest = solver.reaching(found.cost)
    holds(items, smallest, fixed_bytes)
    assert (smallest.n_bytes, smallest.cost) == (found.n_bytes, found.cost)


@given(ITEMS, st.floats(0, 1))
def test_one_state_gives_a_solution_and_a_true_bound(items: list[Item], share: float) -> None:
    solver = Solver.of(items, max_states=1)
    least, most = solver.range()
    budget = least + int(share * (most - least))
    found = solver.within(budget)
    holds(items, found)
    assert found.n_bytes <= budget
    lowest = best(all_mixes(items), budget)[0]
    assert found.cost * (1 - found.gap) <= lowest + 1e-9
    assert found.cost == lowest or not found.exact


def textbook(items: Sequence[Item], budget: int, unit: int) -> float:
    """The least cost by a table over sizes in ``unit``."""
    least = np.full(budget // unit + 1, np.inf)
    least[0] = 0
    for item in items:
        table = np.full_like(least, np.inf)
        for choice in item.choices:
            shift = choice.n_bytes // unit
            np.minimum(table[shift:], least[: len(least) - shift] + choice.cost, out=table[shift:])
        least = table
    return float(least.min())


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_model_gets_what_a_table_over_all_sizes_gives(share: float) -> None:
    items = dense(512, 8, 4096)
    unit = math.gcd(*(choice.n_bytes for item in items for choice in item.choices))
    solver = Solver.of(items)
    least, most = solver.range()
    budget = least + int(share * (most - least))
    found = solver.within(budget)
    holds(items, found)
    assert found.exact
    assert found.cost == pytest.approx(textbook(items, budget, unit), abs=resolution(items))


@pytest.mark.parametrize("items", [dense(4096, 32, 128256), experts(50)], ids=["8B", "MoE"])
def test_real_shapes_are_solved_exactly_and_one_state_is_nearly_as_good(items: tuple[Item, ...]) -> None:
    assert len(items) in (226, 502)
    solver, narrow = Solver.of(items), Solver.of(items, max_states=1)
    least, most = solver.range()
    for share in (0.1, 0.25, 0.5, 0.8):
        budget = least + int(share * (most - least))
        found, quick = solver.within(budget), narrow.within(budget)
        holds(items, found)
        holds(items, quick)
        assert found.exact
        assert found.n_bytes <= budget
        assert found.cost <= quick.cost <= 1.01 * found.cost
        assert quick.cost * (1 - quick.gap) <= found.cost
        assert solver.reaching(found.cost).n_bytes == found.n_bytes


def test_where_states_are_limited_the_gap_is_told() -> None:
    """Costs that fall evenly with the size leave countless mixes nearly equal: the worst case."""
    chance = np.random.default_rng(5)
    sizes = np.sort(chance.integers(1, 10**9, (30, 12))).tolist()
    items = [Item((str(n),), tuple(Choice(str(size), size, 10.0 - size / 1e8) for size in row)) for n, row in enumerate(sizes)]
    solver = Solver.of(items, max_states=64)
    found = solver.within(sum(solver.range()) // 2)
    holds(items, found)
    assert not found.exact
    assert 0 < found.gap < 1e-3


def test_tensors_that_share_a_type_get_one_pick() -> None:
    items = toy(3)
    tied = Item(("blk.0.q", "blk.0.k"), items[0].choices)
    assert len(Solver.of((tied, *items[1:])).within(1500).picks) == 3


def test_of_equal_choices_the_first_is_taken() -> None:
    same = tuple(Choice(kind, 10, 1.0) for kind in ("Q4_0", "IQ4_NL"))
    found = Solver.of([Item((str(n),), same) for n in range(3)]).within(30)
    assert found.picks == (0, 0, 0)


def test_a_tensor_that_costs_nothing_gets_its_smallest_type() -> None:
    """There is room for the largest."""
    items = (*toy(2), Item(("idle",), (Choice("Q8_0", 500, 0.0), Choice("Q2_K", 100, 0.0))))
    solver = Solver.of(items)
    assert solver.within(solver.range()[1]).picks[-1] == 1


@pytest.mark.parametrize("scale", [0.0, 1e-290, 1e-30, 1e30])
def test_costs_of_any_magnitude(scale: float) -> None:
    items = [Item((str(n),), (Choice("Q2_K", 10, 3 * scale), Choice("Q4_K", 20, scale))) for n in range(4)]
    found = Solver.of(items).within(60)
    assert found.n_bytes == (60 if scale else 40)
    assert found.cost == pytest.approx(sums(items, found.picks)[1], rel=1e-9)


@pytest.mark.parametrize(
    ("budget", "what", "todo"),
    [
        (2 << 20, "No mix of this model fits into 2.00 MiB", "Choose a size in that range, or allow smaller types."),
        (9 << 20, "No mix of this model is as large as 9.00 MiB", "Choose a size in that range."),
    ],
)
def test_a_budget_outside_the_range(budget: int, what: str, todo: str) -> None:
    solver = Solver.of([Item(("a",), (Choice("Q2_K", 2 << 20, 2.0), Choice("Q8_0", 7 << 20, 1.0)))], fixed_bytes=1 << 20)
    with pytest.raises(InvalidDataError) as caught:
        solver.within(budget)
    why = "its files are between 3.00 MiB (3,145,728 bytes) and 8.00 MiB (8,388,608 bytes)"
    assert (caught.value.what, caught.value.why, caught.value.todo) == (what, why, todo)


def test_a_cost_that_no_mix_reaches() -> None:
    solver = Solver.of([Item(("a",), (Choice("Q2_K", 2, 0.5), Choice("Q8_0", 7, 0.25)))])
    for cost in (0.2, math.nan):
        with pytest.raises(InvalidDataError, match=r"with its largest types it has 0\.25, with its smallest 0\.5"):
            solver.reaching(cost)
    assert solver.reaching(math.inf).n_bytes == 2


@pytest.mark.parametrize(
    "choices", [(), (Choice("Q2_K", 1, -1.0),), (Choice("Q2_K", 1, math.nan),), (Choice("Q2_K", 1, math.inf),)]
)
def test_costs_that_are_none(choices: tuple[Choice, ...]) -> None:
    with pytest.raises(ValueError, match=r"blk\.0: needs choices"):
        Solver.of([Item(("blk.0",), choices)])
