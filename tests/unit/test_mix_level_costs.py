"""The KLD of levels from the costs of their tensors: sums, scales, and what a map does not know."""

from __future__ import annotations

from math import prod, sqrt

import pytest

from imatrix_runner.engines.levels import Level
from imatrix_runner.mixes.cost_map import CostMap, TensorCosts
from imatrix_runner.mixes.level_costs import FARTHEST, LevelCosts
from imatrix_runner.quantize.recipe import Recipe, RecipeTensor
from imatrix_runner.quantize.usable_imatrix import Failure

SHAPE = (256, 64)


def cost_map(background: float = 0.0, **costs: dict[str, float]) -> CostMap:
    tensors = tuple(TensorCosts(name, SHAPE, "BF16", 1.0, {}, {}, None, each) for name, each in costs.items())
    return CostMap(
        model="m", imatrix="i", text="t", text_sha256="0", n_ctx=512, engine="e", tensors=tensors, background=background
    )


def recipe(level: str, failures: tuple[Failure, ...] = (), **types: str) -> Recipe:
    tensors = tuple(RecipeTensor(name, SHAPE, "BF16", kind, prod(SHAPE), name) for name, kind in types.items())
    return Recipe(Level(level, level), tensors, (), (), failures, False, 1)


MAP = cost_map(a={"Q4_K": 0.03, "Q6_K": 0.003}, b={"Q4_K": 0.05, "Q6_K": 0.005})
LEVELS = (recipe("Q4_K_M", a="Q4_K", b="Q4_K"), recipe("Q6_K", a="Q6_K", b="Q6_K"))


def test_costs_are_added_up() -> None:
    found = LevelCosts.of(MAP, LEVELS)
    assert found.sums == pytest.approx({"Q4_K_M": 0.08, "Q6_K": 0.008})


def test_a_tensor_that_keeps_its_type_costs_nothing() -> None:
    found = LevelCosts.of(MAP, [recipe("X", a="BF16", b="Q4_K"), recipe("COPY", a="BF16", b="BF16")])
    assert found.sums == pytest.approx({"X": 0.05, "COPY": 0.0})
    assert found.predicted({"X": 0.04}).keys() == {"X"}


def test_levels_that_the_map_does_not_know_are_left_out() -> None:
    failure = Failure("it fails", "do without")
    wanted = [recipe("Y", a="IQ1_S", b="Q4_K"), recipe("Z", c="Q4_K"), recipe("F", (failure,), a="Q4_K"), *LEVELS]
    found = LevelCosts.of(MAP, wanted)
    assert found.sums.keys() == {"Q4_K_M", "Q6_K"}


def test_a_map_of_before_there_were_costs_predicts_nothing() -> None:
    assert LevelCosts.of(cost_map(a={}, b={}), LEVELS).sums == {}


def klds(costs: LevelCosts, measured: dict[str, float]) -> dict[str, float]:
    return {name: each.kld for name, each in costs.predicted(measured).items()}


def test_without_a_measured_level_nothing_is_predicted() -> None:
    assert LevelCosts.of(MAP, LEVELS).predicted({}) == {}
    assert LevelCosts.of(MAP, LEVELS).predicted({"elsewhere": 0.1}) == {}


def test_one_measured_level_scales_all() -> None:
    assert klds(LevelCosts.of(MAP, LEVELS), {"Q4_K_M": 0.04}) == pytest.approx({"Q4_K_M": 0.04, "Q6_K": 0.004})


def test_between_two_measured_levels_the_logarithm_is_linear_and_beyond_the_scale_stays() -> None:
    sums = {f"L{at}": 0.001 * 2**at for at in range(6)}
    law = {level: 0.4 * total**0.9 for level, total in sums.items()}
    found = klds(LevelCosts(sums), {level: law[level] for level in ("L1", "L4")})
    for level in ("L1", "L2", "L3", "L4"):
        assert found[level] == pytest.approx(law[level], rel=1e-9)
    assert found["L0"] == pytest.approx(law["L1"] / 2)
    assert found["L5"] == pytest.approx(law["L4"] * 2)


def test_levels_of_one_sum_give_their_mean() -> None:
    assert klds(LevelCosts({"A": 0.03, "B": 0.03}), {"A": 0.01, "B": 0.04})["A"] == pytest.approx(sqrt(0.01 * 0.04))


def test_how_far_the_next_measured_level_is() -> None:
    sums = {"far": 0.001, "A": 0.02, "B": 0.05, "C": 0.1, "D": 0.4}
    found = LevelCosts(sums).predicted({"A": 0.01, "D": 0.3})
    assert {name: each.apart for name, each in found.items()} == pytest.approx({"A": 1.0, "B": 2.5, "C": 4.0, "D": 1.0})
    assert FARTHEST < 0.02 / 0.001


def test_levels_that_say_nothing_are_left_out() -> None:
    found = LevelCosts({"A": 0.03, "COPY": 0.0}, background=1e-5)
    assert found.predicted({"COPY": 0.001, "A": 1e-6}) == {}


def test_the_background_counts_once_and_is_not_scaled() -> None:
    found = LevelCosts.of(cost_map(1e-3, a={"Q4_K": 0.03, "Q6_K": 0.003}, b={"Q4_K": 0.05, "Q6_K": 0.005}), LEVELS)
    assert klds(found, {"Q4_K_M": 0.021}) == pytest.approx({"Q4_K_M": 0.021, "Q6_K": 0.003})
