"""What a pass has to compute, cut into units for several workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from imatrix_runner.engines.pass_parts import PassWork, WantedPair, WantedPlace
from imatrix_runner.engines.pass_units import cut_units, pair_cost, work_cost

TYPES = ("q8_0", "q4_K", "q6_K", "iq3_xxs", "iq1_s")


def work(name: str, elements: int, types: Sequence[str] = TYPES[:3]) -> PassWork:
    pairs = [WantedPair(kind, elements // 2, (WantedPlace(kind.upper(), 0, 64),)) for kind in types]
    return PassWork(name, elements, 2 * elements, tuple(pairs))


works_of_a_model = st.lists(
    st.builds(work, st.text(max_size=3), st.integers(1, 1 << 30), st.lists(st.sampled_from(TYPES), min_size=1, unique=True)),
    max_size=12,
)


def units_cost(units: Sequence[Sequence[PassWork]]) -> list[int]:
    return [sum(map(work_cost, unit)) for unit in units]


@given(works_of_a_model, st.integers(1, 64))
def test_every_pair_is_in_one_unit(works: list[PassWork], n_workers: int) -> None:
    units = cut_units(works, n_workers)
    wanted = Counter((each.tensor, each.elements, pair) for each in works for pair in each.pairs)
    assert Counter((each.tensor, each.elements, pair) for unit in units for each in unit for pair in each.pairs) == wanted


@given(works_of_a_model, st.integers(1, 64))
def test_no_unit_is_larger_than_it_must_be_and_the_costliest_come_first(works: list[PassWork], n_workers: int) -> None:
    least = 10_000_000
    units = cut_units(works, n_workers, least=least)
    costs = units_cost(units)
    assert costs == sorted(costs, reverse=True)
    size = max(least, sum(map(work_cost, works)) // (16 * n_workers))
    assert all(cost <= size or [len(each.pairs) for each in unit] == [1] for cost, unit in zip(costs, units, strict=True))


def test_many_workers_get_many_units_of_a_large_model() -> None:
    works = [work(f"blk.{layer}", 50_000_000) for layer in range(100)]
    assert 16 <= len(cut_units(works, 1)) <= 20
    assert 8 * 16 <= len(cut_units(works, 8, least=1)) <= 8 * 32
    assert cut_units(works[:2], 64, least=1 << 40) == (tuple(works[:2]),)


def test_a_large_tensor_is_divided_by_its_types() -> None:
    small, large = work("norm", 1000), work("experts", 1 << 30, TYPES)
    units = cut_units([small, large], 4, least=1)
    assert [[pair.type for pair in unit[0].pairs] for unit in units[:2]] == [["iq1_s"], ["iq3_xxs"]]
    assert units[-1] == (small,)
    assert pair_cost(large, large.pairs[-1]) > pair_cost(large, large.pairs[0])


def test_nothing_is_no_unit() -> None:
    assert cut_units([], 3) == ()
